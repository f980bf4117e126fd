"""The guard against collapse: what it sees in a group, when it warns, when it stops a run, and how it resumes."""

import dataclasses
import json
import math

import pytest

from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.data.rows import Row
from mlxvr.errors import ConfigError
from mlxvr.grpo import run
from mlxvr.grpo.collapse_guard import CollapseGuard, GroupAnswer, summarise_answers
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.grpo.trainer import train

NO_SECOND = "\\boxed{A}<think>look</think>"


def said(first: str, second: str) -> str:
    return f"\\boxed{{{first}}}<think>look</think>\\boxed{{{second}}}"


def group(row: int, answer: str = "", *, unanimous: bool | None = False, kind="exact_match", question=None):
    return GroupAnswer(
        row=f"r{row}",
        kind=kind,
        question=f"q{row % 3}" if question is None else question,
        answer=answer or f"answer {row}",
        unanimous=unanimous,
    )


def feed(guard: CollapseGuard, steps: range, *, entropy: float | None = 0.5, **options) -> dict[int, str]:
    """One group a step; the warnings by step."""
    found = {step: guard.observe([group(step, **options)], entropy) for step in steps}
    return {step: warning for step, warning in found.items() if warning}


ROW = Row(id="r", question="Which?", answer=None, options=("red", "blue"))


@pytest.mark.parametrize(
    ("kind", "seconds", "answer", "unanimous"),
    [
        ("exact_match", ["A", "(A)", "a"], "A", True),
        ("exact_match", ["A", "A", "B"], "A", False),
        ("exact_match", ["B", "A", "A"], "A", False),
        ("exact_match", ["A", "B"], "", False),
        ("exact_match", ["A", ""], "", False),
        ("exact_match", ["", ""], "", True),
        ("exact_match", ["A"], "", None),
        ("math", ["1/2", "0.5", "1/2"], "1/2", False),
        ("math", ["1/2", "1/2"], "1/2", True),
        ("iou", ["[0, 5]", "[0, 10]", "[5, 10]"], "[0, 10]", False),
        ("iou", ["[0, 10]", "[0.0, 10.1]"], "[0, 10]", True),
        ("gqa", ["A <> [0, 10]", "A <> [0, 10]"], "A <> [0, 10]", True),
    ],
)
def test_what_a_group_says(kind: str, seconds: list[str], answer: str, unanimous: bool | None) -> None:
    row = dataclasses.replace(ROW, kind=kind)
    found = summarise_answers(row, [said("A", second) if second else NO_SECOND for second in seconds])
    assert found == GroupAnswer(row="r", kind=kind, question="Which?\nred\nblue", answer=answer, unanimous=unanimous)


def test_healthy_training_is_left_alone() -> None:
    guard = CollapseGuard(3, rows=4)
    assert feed(guard, range(40)) == {}
    for step in range(40, 80):  # often unanimous, never all groups of three steps
        assert guard.observe([group(step, unanimous=True), group(step + 1, unanimous=step % 3 > 0)], 0.5) is None


def test_unanimous_groups_warn_and_then_stop() -> None:
    guard = CollapseGuard(3, rows=100)
    warnings = feed(guard, range(1, 6), unanimous=True)
    assert list(warnings) == [3]
    assert "unanimous" in warnings[3]
    assert "--beta" in warnings[3]
    assert "\n" not in warnings[3]
    with pytest.raises(ConfigError, match=r"last 3 steps are unanimous.*raise --beta, lower --learning-rate or add"):
        feed(guard, range(6, 7), unanimous=True)
    assert list(feed(guard, range(7, 10), unanimous=True)) == [7]  # who goes on has another window


def test_a_sign_that_goes_away_begins_again() -> None:
    guard = CollapseGuard(3, rows=100)
    assert list(feed(guard, range(1, 6), unanimous=True)) == [3]
    assert feed(guard, range(6, 7), unanimous=False) == {}
    assert list(feed(guard, range(7, 12), unanimous=True)) == [9]


def test_steps_without_unlabelled_groups_change_nothing() -> None:
    guard = CollapseGuard(2, rows=100)
    before = guard.state()
    assert guard.observe([], 0.0) is None
    assert guard.state() == before
    assert feed(guard, range(20), unanimous=None) == {}  # of one completion: not to be judged


def test_entropy_against_its_start() -> None:
    guard = CollapseGuard(4, rows=100, entropy_share=0.1, entropy_floor=0.0)
    assert feed(guard, range(5), entropy=0.6) == {}
    assert feed(guard, range(5, 8), entropy=0.03) == {}  # the mean is (0.6 + 3 * 0.03) / 4 = 0.1725
    warnings = feed(guard, range(8, 12), entropy=0.03)
    assert list(warnings) == [8]  # and now 0.03 < 0.06
    assert "entropy is 0.03 nats a token over the last 4 steps, 0.6 at the start" in warnings[8]
    with pytest.raises(ConfigError, match="entropy"):
        feed(guard, range(12, 13), entropy=0.03)


def test_entropy_against_the_floor() -> None:
    assert feed(CollapseGuard(3, rows=100, entropy_floor=0.01), range(9), entropy=0.02) == {}
    assert list(feed(CollapseGuard(3, rows=100, entropy_floor=0.03), range(4), entropy=0.02)) == [2]
    for unknown in (None, math.nan, math.inf):
        assert feed(CollapseGuard(3, rows=100, entropy_floor=0.03), range(9), entropy=unknown) == {}


def test_a_constant_answer_whatever_is_asked() -> None:
    guard = CollapseGuard(5, rows=4, constant_share=0.75)
    assert feed(guard, range(2), answer="B") == {}
    assert feed(guard, range(2, 4), answer="C") == {}
    assert guard.observe([group(4, "(b)")], 0.5) is None  # of the last four B, C, C, b
    assert guard.observe([group(5, "B")], 0.5) is None  # C, C, b, B
    warning = guard.observe([group(6, "b.")], 0.5)  # C, b, B and `b.`, which is another text
    assert warning is None
    warning = guard.observe([group(7, "B")], 0.5)  # b, B, `b.`, B
    assert warning is not None
    assert "3 of the last 4 rows of kind exact_match are answered '(b)'" in warning
    with pytest.raises(ConfigError, match="whatever is asked"):
        feed(guard, range(8, 20), answer="B")


def test_rows_that_come_again_count_once() -> None:
    guard = CollapseGuard(5, rows=4, constant_share=1.0)
    for _ in range(10):  # three rows are not four
        assert feed(guard, range(3), answer="B") == {}
    assert list(feed(guard, range(3, 5), answer="B")) == [3]
    assert guard.observe([group(4, "C")], 0.5) is None  # the row's newer answer
    assert [one["row"] for one in guard.state()["answers"]] == ["r1", "r2", "r3", "r4"]
    feed(guard, range(1, 2))  # now the last
    feed(guard, range(5, 6))
    assert [one["row"] for one in guard.state()["answers"]] == ["r3", "r4", "r1", "r5"]


def test_one_question_may_have_one_answer() -> None:
    assert feed(CollapseGuard(5, rows=4), range(40), answer="B", question="Is there a dog?") == {}


def test_one_answer_to_one_question_whatever_the_clip() -> None:
    """All rows ask the same of different clips: that they once differed says that it was not always so."""
    guard = CollapseGuard(5, rows=4, constant_share=1.0)
    options = {"question": "Which color is the ball?"}
    assert feed(guard, range(4), **options) == {}
    assert feed(guard, range(4, 7), answer="red", **options) == {}  # of the last four three
    other = CollapseGuard(5, rows=4, constant_share=1.0)
    other.restore(json.loads(json.dumps(guard.state())))
    for one in (guard, other):
        warning = one.observe([group(7, "red", **options)], 0.5)
        assert warning is not None
        assert "4 of the last 4 rows of kind exact_match are answered 'red', whatever the clip" in warning
        with pytest.raises(ConfigError, match="whatever the clip"):
            feed(one, range(8, 14), answer="red", **options)


def test_rows_without_a_majority_are_not_constant() -> None:
    guard = CollapseGuard(5, rows=4)
    for step in range(40):
        assert guard.observe([dataclasses.replace(group(step), answer="")], 0.5) is None


def test_kinds_are_judged_apart() -> None:
    guard = CollapseGuard(50, rows=4)
    found = [
        guard.observe([group(2 * step, "A"), group(2 * step + 1, f"[0, {100 + step}]", kind="iou")], 0.5)
        for step in range(4)
    ]
    assert found[:3] == [None] * 3
    assert "exact_match" in found[3]
    assert "iou" not in found[3]
    moments = CollapseGuard(50, rows=4)
    assert list(feed(moments, range(9), answer="[0, 100]", kind="iou")) == [3]
    far = CollapseGuard(50, rows=4)
    assert not any(far.observe([group(step, f"[0, {2**step}]", kind="iou")], 0.5) for step in range(9))


@pytest.mark.parametrize("cut", [0, 2, 4, 5])
def test_it_goes_on_where_it_was(cut: int) -> None:
    def run(guard: CollapseGuard, steps: range) -> list[str]:
        found = []
        for step in steps:
            try:
                found.append(guard.observe([group(step, "A", unanimous=True)], 0.5 if step < 2 else 1e-4) or "")
            except ConfigError as error:
                found.append(f"stopped: {error}")
        return found

    whole = run(CollapseGuard(3, rows=4), range(12))
    assert sum(map(bool, whole)) > 3
    first = CollapseGuard(3, rows=4)
    before = run(first, range(cut))
    second = CollapseGuard(3, rows=4)
    second.restore(json.loads(json.dumps(first.state())))
    assert before + run(second, range(cut, 12)) == whole
    assert second.state()["answers"] == [dataclasses.asdict(group(step, "A", unanimous=True)) for step in range(8, 12)]


@pytest.mark.parametrize("state", [{}, {"unanimous": 3}, {**CollapseGuard().state(), "answers": [{"row": "r"}]}])
def test_a_state_of_something_else_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="state"):
        CollapseGuard().restore(state)


@pytest.mark.parametrize(
    "bars",
    [{"window": 0}, {"rows": 1}, {"constant_share": 1.5}, {"entropy_share": -0.1}, {"entropy_floor": math.nan}],
)
def test_bars_that_make_no_sense_are_refused(bars: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        CollapseGuard(**bars)


@pytest.mark.slow
def test_a_run_that_has_collapsed_is_saved_before_it_ends(tmp_path, monkeypatch) -> None:
    """Groups of nearly greedy completions are unanimous: a warning after two steps, the end two steps later."""
    rows = [json.loads(line) for line in (demo_folder() / "clips.jsonl").read_text().splitlines()[:3]]
    data = tmp_path / "unlabelled.jsonl"
    data.write_text("".join(f"{json.dumps({**row, 'answer': None})}\n" for row in rows))
    monkeypatch.setattr(run, "CollapseGuard", lambda: CollapseGuard(2, rows=100, entropy_share=0, entropy_floor=0))
    options = {"data": data, "media_root": demo_folder(), "output": tmp_path / "run", "steps": 9, "batch_size": 1}
    options |= {"group_size": 2, "max_completion_tokens": 16, "temperature": 1e-3, "reward": ("agreement",)}
    notes: list[str] = []
    with pytest.raises(ConfigError, match="has collapsed: all groups of the last 2 steps are unanimous"):
        train(TrainConfig(**options), on_note=notes.append)
    assert len([note for note in notes if "may be collapsing" in note]) == 1

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    assert steps() == [1, 2, 3, 4]
    report = train(TrainConfig(**{**options, "steps": 6}, resume=True))  # another window begins, and is not full
    assert (report.steps, steps()) == (6, [1, 2, 3, 4, 5, 6])
