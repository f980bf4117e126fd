r"""Rewards without labels against groups worked by hand, coherence against one completion at a time, and the guard."""

import dataclasses
import json
import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import FAMILIES
from groups import make_group, tiny_model
from qwen_tokenizer import qwen

from mlxvr.answering.transcript import FALLBACK
from mlxvr.data.rows import Row
from mlxvr.errors import ConfigError, DataError
from mlxvr.grading.reward import Weights, score
from mlxvr.grpo import trainer
from mlxvr.grpo.step import label_free_rewards
from mlxvr.grpo.step.label_free_rewards import (
    CollapseGuard,
    GroupAnswer,
    agreement,
    coherence,
    group_answer,
    label_free_reward,
)
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.model.network import VideoModel
from mlxvr.reasoner.reasoner import demo_folder


def said(first: str, second: str) -> str:
    return f"\\boxed{{{first}}}<think>look</think>\\boxed{{{second}}}"


NO_FIRST = "<think>look</think>\\boxed{A}"
NO_SECOND = "\\boxed{A}<think>look</think>"
TWO_BOXES = "\\boxed{A}<think>look</think>\\boxed{A} \\boxed{A}"

# kind, completions, their agreement
GROUPS = {
    "majority": (
        "exact_match",
        [said("A", "A"), said("B", "A"), said(FALLBACK, "A"), said("B", "B"), NO_FIRST, NO_SECOND],
        [1, 0.75, 1, 0, 0.75, 0],
    ),
    "one answer in many spellings": (
        "exact_match",
        [said("A", "(A)"), said("a)", "a"), said("B", "b")],
        [1, 1, 0],
    ),
    "two largest classes": ("exact_match", [said(one, one) for one in "AABBC"], [0.5, 0.5, 0.5, 0.5, 0]),
    "two largest, one disagrees with itself": (
        "exact_match",
        [said("A", "A"), said("B", "A"), said("B", "B"), said("B", "B")],
        [0.5, 0.375, 0.5, 0.5],
    ),
    "all differ": ("exact_match", [said(one, one) for one in "ABCD"], [0, 0, 0, 0]),
    "one answer": ("exact_match", [said("A", "A"), NO_SECOND, TWO_BOXES], [0, 0, 0]),
    "one completion": ("exact_match", [said("A", "A")], [0]),
    "none": ("exact_match", [], []),
    "declining is no vote": ("exact_match", [said("A", FALLBACK)] * 3 + [said("A", "A")] * 2, [0, 0, 0, 1, 1]),
    # IoU of 1 and 2 is 1/2, of 1 and 3 is 1/2, of 2 and 3 is 0
    "intervals": (
        "iou",
        [said(one, one) for one in ("[0, 10]", "[0, 5]", "[5, 10]")],
        [0.5, 0.25, 0.25],
    ),
    "intervals, own": (
        "iou",
        [said("[0, 5]", "[0, 10]"), said(FALLBACK, "[0, 10]"), said("[2, 3]", "no idea"), NO_SECOND],
        [0.5 * 0.875, 0.5, 0, 0],
    ),
    # (1 + 1/2) / 2, (0 + 1) / 2 and (0 + 1/2) / 2
    "grounded": (
        "gqa",
        [said(one, one) for one in ("A <> [0, 10]", "A <> [0, 5]", "B <> [0, 10]")],
        [0.625, 0.5, 0.375],
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_agreement_as_worked_by_hand(name: str) -> None:
    kind, texts, expected = GROUPS[name]
    np.testing.assert_allclose(agreement(texts, kind), expected, atol=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_agreement_does_not_depend_on_the_order(name: str) -> None:
    kind, texts, _ = GROUPS[name]
    np.testing.assert_allclose(agreement(texts[::-1], kind), agreement(texts, kind)[::-1], atol=1e-12)


def test_formulas_agree_by_their_value() -> None:
    pytest.importorskip("math_verify")
    texts = [said("1/2", "0.5"), said("$\\frac{1}{2}$", "1/2"), said("0.5", "2")]
    np.testing.assert_allclose(agreement(texts, "math"), [1, 1, 0])
    written = [said("$\\sqrt{8}$", "2\\sqrt{2}"), said("2\\sqrt{2}", "$\\sqrt{8}$")]  # which is first does not matter
    np.testing.assert_allclose(agreement(written, "math"), [1, 1])
    np.testing.assert_allclose(agreement(written[::-1], "math"), [1, 1])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(DataError, match="'essay'"):
        agreement([said("A", "A"), said("A", "A")], "essay")


def test_the_reward_as_worked_by_hand() -> None:
    texts = [said("A", "A"), said("B", "A"), said(FALLBACK, "A"), said("A", "B"), "A: " + said(FALLBACK, "A")]
    parts = {
        "agreement": np.array([1.0, 0.75, 1.0, 0.0, 1.0]),
        "coherence": np.array([0.5, 0.25, 0.6, 0.3, 0.4]),
    }
    found = label_free_reward(parts, texts, "exact_match", weights=Weights())
    assert [one.first for one in found] == [1, 0, 0, 1, 0]
    assert [one.second for one in found] == pytest.approx([0.75, 0.5, 0.8, 0.15, 0.7])
    assert [one.format for one in found] == [1, 1, 1, 1, 0]
    assert [one.fallback for one in found] == [0, 0, 1, 0, 0]  # 0.7 is not above 0.7
    assert [one.total for one in found] == pytest.approx([2.725, 1.55, 2.18, 2.065, 0.77])
    weights = Weights(first=1.0, second=10.0, format=100.0, fallback=1000.0)
    assert label_free_reward(parts, texts, "exact_match", weights=weights)[2].total == pytest.approx(1108.0)
    alone = label_free_reward({"coherence": parts["coherence"]}, texts, "exact_match")
    assert [one.second for one in alone] == pytest.approx(parts["coherence"])


def test_a_first_answer_counts_by_the_other_completions_intervals() -> None:
    texts = [said("[0, 10]", "[90, 91]"), said("[0, 10]", "[0, 10]"), said("[0, 5]", "[0, 5]")]
    found = label_free_reward({"agreement": agreement(texts, "iou")}, texts, "iou")
    # of the first: 1 and 1/2 with the others; of the second: 0 and 1/2; of the third: 0 and 1/2
    assert [one.first for one in found] == pytest.approx([0.75, 0.25, 0.25])
    assert [one.second for one in found] == pytest.approx([0, 0.25, 0.25])


def test_where_the_majority_is_right_it_pays_what_the_label_would() -> None:
    texts = [said("A", "A"), said("A", "A"), said(FALLBACK, "A"), said("C", "B"), said(FALLBACK, "C"), NO_SECOND]
    found = label_free_reward({"agreement": agreement(texts, "exact_match")}, texts, "exact_match")
    assert found == [score(text, "A") for text in texts]


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({}, ConfigError),
        ({"length": np.zeros(2)}, ConfigError),
        ({"agreement": np.zeros(3)}, ValueError),
    ],
)
def test_scores_that_do_not_fit_are_refused(parts: dict[str, np.ndarray], error: type[Exception]) -> None:
    with pytest.raises(error):
        label_free_reward(parts, [said("A", "A")] * 2, "exact_match")


# Coherence -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VideoModel:
    return tiny_model(tmp_path_factory.mktemp("labelfree") / "m", request.param)


def naive_logprobs(model: VideoModel, prompt: SimpleNamespace, ids: list[int], temperature: float) -> np.ndarray:
    """(T,) of one completion, from the whole sequence and all of its logits."""
    after = np.tile(prompt.next_position + np.arange(len(ids)), (3, 1))
    hidden = model.hidden(
        mx.array(np.concatenate([prompt.ids, ids]).astype(np.int32))[None],
        mx.array(np.concatenate([prompt.positions, after], axis=1).astype(np.int32))[:, None],
        features=prompt.features,
        media_mask=np.concatenate([prompt.media_mask, np.zeros(len(ids), dtype=bool)])[None],
    )
    logits = np.array(model.logits(hidden[0]).astype(mx.float32), dtype=np.float64)[len(prompt.ids) - 1 : -1]
    logits /= temperature
    return logits[np.arange(len(ids)), ids] - np.log(np.exp(logits).sum(axis=-1))


def tokens_of(model: VideoModel, ids: list[int], answer: str) -> list[int]:
    """The tokens of the last place where an ASCII answer stands, found by the lengths of their texts."""
    pieces = [model.tokenizer.decode([token]) for token in ids]
    ends = np.cumsum([len(piece) for piece in pieces])
    start = "".join(pieces).rindex(answer)
    return [index for index, end in enumerate(ends) if end > start and end - len(pieces[index]) < start + len(answer)]


def roll(model: VideoModel, texts: list[str], temperature: float = 1.0) -> SimpleNamespace:
    """A rollout of these texts, with the naive log-probs."""
    prompt = make_group(model, lengths=(1,)).prompt
    end = model.tokenizer.encode("<|im_end|>")
    completions = []
    for text in texts:
        ids = model.tokenizer.encode(text) + end
        logprobs = naive_logprobs(model, prompt, ids, temperature).astype(np.float32)
        completions.append(
            SimpleNamespace(ids=np.array(ids, dtype=np.int32), logprobs=logprobs, text=text, truncated=False)
        )
    return SimpleNamespace(prompt=prompt, completions=tuple(completions))


# completion, the answer as it is put directly, what of it counts
CHAINS = [
    ("\\boxed{A}<think>Two dogs, so \\boxed{C}.</think>\\boxed{B}", "B", "B"),
    ("\\boxed{B}<think>It is a cat.</think>\\boxed{ (B) the red cup }", "(B) the red cup", "B"),
    ("\\boxed{A}<think>It starts late</think>\n\n\\boxed{[1.5, 12.0]}", "[1.5, 12.0]", "[1.5, 12.0]"),
    ("<think>no first box</think>So: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "\\frac{1}{2}"),
    ("\\boxed{B}<think>B</think>\\boxed{B}", "B", "B"),
]
WITHOUT = [
    "\\boxed{B}",
    NO_SECOND,
    TWO_BOXES,
    said("A", " "),
    said("A", FALLBACK),
    "\\boxed{A}<think>cut off \\boxed{B}",
    "\\boxed{A}<think>x</think>\\boxed{B",
]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_coherence_is_the_naive_one(model: VideoModel, temperature: float) -> None:
    rollout = roll(model, [text for text, _, _ in CHAINS] + WITHOUT, temperature)
    expected = []
    for (_, answer, counts), one in zip(CHAINS, rollout.completions):
        ids = model.tokenizer.encode(f"\\boxed{{{answer}}}")
        direct = naive_logprobs(model, rollout.prompt, ids, temperature)[tokens_of(model, ids, counts)].mean()
        supported = one.logprobs[tokens_of(model, one.ids.tolist(), counts)].mean()
        expected.append(1.0 / (1.0 + math.exp(direct - supported)))
    assert np.ptp(expected) > 0.01  # a random model has little to say; the comparison is finer
    found = coherence(model, rollout, temperature=temperature)
    np.testing.assert_allclose(found, expected + [0.0] * len(WITHOUT), atol=2e-5)


def test_one_pass_for_every_answer_that_differs(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    run = label_free_rewards.completion_logprobs

    def count(model, packed, **options):
        passes.append(packed.mask.shape[0])
        return run(model, packed, **options)

    monkeypatch.setattr(label_free_rewards, "completion_logprobs", count)
    coherence(model, roll(model, [said("A", "B"), said("C", "B"), said("A", " A"), NO_SECOND]))
    assert passes == [2]
    assert coherence(model, roll(model, WITHOUT)).tolist() == [0.0] * len(WITHOUT)
    assert passes == [2]


def test_every_byte_of_a_character_counts(model: VideoModel) -> None:
    ids = model.tokenizer.encode(said("A", "世界"))
    rollout = roll(model, [said("A", "世界")])
    stop = max(index for index, token in enumerate(ids) if "}" in model.tokenizer.decode([token]))
    start = max(index for index, token in enumerate(ids) if "{" in model.tokenizer.decode([token])) + 1
    assert stop - start > 2
    alone = model.tokenizer.encode("\\boxed{世界}")
    direct = naive_logprobs(model, rollout.prompt, alone, 1.0)[-1 - (stop - start) : -1].mean()
    supported = rollout.completions[0].logprobs[start:stop].mean()
    assert coherence(model, rollout)[0] == pytest.approx(1 / (1 + math.exp(direct - supported)), abs=2e-5)


# answer, the pieces of it that count in the real tokenizer, whose `}` is often a part of something else
PIECES = {
    "(B)": ["B"],
    "[1.5, 2.0]": ["[", "1", ".", "5", ",", " ", "2", ".", "0", "]}"],
    "the red cup": ["the", " red", " cup"],
}


@pytest.mark.parametrize("flavour", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize("answer", PIECES)
def test_only_the_answers_tokens_count(answer: str, flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the chain they get -1, directly -2.5, and everything else -90: the sigmoid of 1.5."""
    tokenizer = qwen(flavour)
    counting = PIECES[answer]

    def logprobs_of(ids: list[int], value: float) -> np.ndarray:
        pieces = [tokenizer.decode([token]) for token in ids]
        size = len(counting)
        start = max(at for at in range(len(pieces) - size + 1) if pieces[at : at + size] == counting)
        logprobs = np.full(len(ids), -90.0, dtype=np.float32)
        logprobs[start : start + size] = value
        return logprobs

    def encode(text: str, *, literal: tuple[int, int]) -> list[int]:
        assert literal == (0, len(text))  # no control characters from an answer
        return tokenizer.encode(text)

    prompt = SimpleNamespace(
        ids=np.zeros(1, np.int32),
        positions=np.zeros((3, 1), np.int32),
        media_mask=np.zeros(1, bool),
        features=None,
        next_position=1,
    )
    ids = tokenizer.encode(f"\\boxed{{{answer}}}<think>It is {answer}</think>\\boxed{{{answer}}}<|im_end|>")
    completion = SimpleNamespace(ids=np.array(ids, np.int32), logprobs=logprobs_of(ids, -1.0))
    monkeypatch.setattr(
        label_free_rewards,
        "completion_logprobs",
        lambda _, packed, **__: logprobs_of(packed.targets[0].tolist(), -2.5)[None],
    )
    fake = SimpleNamespace(tokenizer=SimpleNamespace(encode=encode, decode=tokenizer.decode))
    found = coherence(fake, SimpleNamespace(prompt=prompt, completions=(completion,)))
    assert found == pytest.approx([1 / (1 + math.exp(-1.5))])
    completion.logprobs = completion.logprobs * 1e6
    assert coherence(fake, SimpleNamespace(prompt=prompt, completions=(completion,))).tolist() == [0.0]


# The guard -----------------------------------------------------------------------------------------------------------


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
    found = group_answer(row, [said("A", second) if second else NO_SECOND for second in seconds])
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
    monkeypatch.setattr(trainer, "CollapseGuard", lambda: CollapseGuard(2, rows=100, entropy_share=0, entropy_floor=0))
    options = {"data": data, "media_root": demo_folder(), "output": tmp_path / "run", "steps": 9, "batch_size": 1}
    options |= {"group_size": 2, "max_completion_tokens": 16, "temperature": 1e-3, "reward": ("agreement",)}
    notes: list[str] = []
    with pytest.raises(ConfigError, match="has collapsed: all groups of the last 2 steps are unanimous"):
        trainer.train(TrainConfig(**options), on_note=notes.append)
    assert len([note for note in notes if "may be collapsing" in note]) == 1

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    assert steps() == [1, 2, 3, 4]
    report = trainer.train(
        TrainConfig(**{**options, "steps": 6}, resume=True)
    )  # another window begins, and is not full
    assert (report.steps, steps()) == (6, [1, 2, 3, 4, 5, 6])
