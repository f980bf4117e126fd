"""A training run before its first step: what is refused leaves nothing behind, and every remedy that is named works."""

import json
import re
from pathlib import Path

import pytest
from clips import write_clip
from groups import tiny_model

import mlxvr
from mlxvr.errors import ConfigError, DataError, MediaError, OutOfMemoryError
from mlxvr.grpo.setup import frame_spec
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.grpo.train_state import read_state, state_file
from mlxvr.grpo.trainer import train
from mlxvr.model.loading import load_model
from mlxvr.runtime import device_memory
from mlxvr.train import main, make_parser, read_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, a clip, and rows: text alone, and the clip in the last."""
    folder = tmp_path_factory.mktemp("setup")
    tiny_model(folder / "model", "qwen3_vl")
    write_clip(folder / "a.mp4", frames=60)
    rows = [{"id": f"t{n}", "question": f"Is it {n}?", "options": ["yes", "no"], "answer": "A"} for n in range(10)]
    rows.append({"id": "clip", "video": "a.mp4", "question": "What?", "answer": "left"})
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "text.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[:2]))
    return folder


def run(folder, output, data="rows.jsonl", **changes):
    settings = {
        "model": folder / "model",
        "data": folder / data,
        "group_size": 2,
        "max_completion_tokens": 3,
        "batch_size": 1,
        "steps": 1,
    }
    notes = []
    return train(TrainConfig(**{**settings, "output": output, **changes}), on_note=notes.append), notes


def test_a_refused_prompt_leaves_no_run_behind(folder, tmp_path):
    """The remedy that the first message names works in the same folder, and so does leaving --resume out."""
    output = tmp_path / "run"
    with pytest.raises(
        DataError, match=r"rows\.jsonl:11: the prompt has .*: raise --max-prompt-tokens, or lower --vid"
    ):
        run(folder, output, max_prompt_tokens=360)
    assert not output.exists()
    with pytest.raises(ConfigError, match=r"holds no state to resume from.*: leave --resume out to start one"):
        run(folder, output, max_prompt_tokens=8192, resume=True)
    report, _ = run(folder, output, max_prompt_tokens=8192)
    assert report.steps == 1


def test_what_fails_in_the_first_step_leaves_no_run_behind(folder, tmp_path, monkeypatch):
    """Whatever it is: here a reward function. Files of other programs stay."""
    output = tmp_path / "run"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    (tmp_path / "own_module.py").write_text("def fail(text, row):\n    raise ValueError('no')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="the reward function failed"):
        run(folder, output, reward=("own_module:fail",))
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    report, _ = run(folder, output)
    assert report.steps == 1


def test_a_run_of_no_steps_counts_as_none(folder, tmp_path, monkeypatch):
    """Its validation is kept for a resume with the same settings; with others the run begins anew."""
    output = tmp_path / "run"
    options = {"valid": folder / "text.jsonl", "data": "text.jsonl"}
    (tmp_path / "own_module2.py").write_text(
        "calls = []\n"
        "def fail(text, row):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 2:\n"
        "        raise ValueError('no')\n"
        "    return 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="the reward function failed"):  # in the first step, after the validation
        run(folder, output, reward=("own_module2:fail",), **options)
    assert read_state(output).step == 0
    entries = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(entry)["step"] for entry in entries] == [0]
    report, _ = run(folder, output, resume=True, seed=5, **options)
    assert (report.steps, sorted(report.valid)) == (1, [0, 1])
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 1]
    with pytest.raises(ConfigError, match="holds a run already"):
        run(folder, output, **options)
    with pytest.raises(ConfigError, match="begun with seed 5, and now it is 6"):
        run(folder, output, resume=True, seed=6, steps=2, **options)


@pytest.mark.parametrize("there", ["nothing", "a model", "a file"])
def test_resume_says_that_there_is_no_run(folder, tmp_path, capsys, there):
    output = {"nothing": tmp_path / "none", "a model": folder / "model", "a file": folder / "rows.jsonl"}[there]
    assert main(["--resume", "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: {re.escape(str(output))} holds no run to resume: leave --resume out .*\n", error)


def test_a_rank_that_does_not_write_goes_on_without_a_run_of_its_own(folder, tmp_path):
    """It is told so by rank 0, which has the run, and not before the ranks have met: rank 0 would wait for ever."""
    argv = ["--resume", "--output", str(tmp_path / "none"), "--data", str(folder / "rows.jsonl")]
    assert read_config(make_parser().parse_args(argv)).resume


def test_files_that_are_missing_are_found_before_the_start(folder, tmp_path):
    rows = [{"id": str(n), "question": "What?", "answer": "A", "video": f"{n}.mp4"} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(MediaError, match=r"rows\.jsonl:1: .*0\.mp4 does not exist.*--skip-bad-rows"):
        run(folder, tmp_path / "run", data=tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"none of the 2 rows can be used; the first: .*rows\.jsonl"):
        run(folder, tmp_path / "run", data=tmp_path / "rows.jsonl", skip_bad_rows=True, batch_size=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("filter_only", [False, True])
def test_memory_is_checked_against_what_may_be_used(folder, tmp_path, monkeypatch, filter_only):
    """Metal recommends less than there is; elsewhere a tenth of the memory is left to others."""
    what = "sampling" if filter_only else "training"
    with pytest.raises(OutOfMemoryError, match=rf"{what} needs about .*; 1\.0 MB are allowed"):
        run(folder, tmp_path / "run", memory_limit=0.001, filter_only=filter_only)
    monkeypatch.setattr(device_memory, "usable_memory", lambda: 2_000_000)
    monkeypatch.setattr(device_memory, "backend", lambda: "metal")
    with pytest.raises(OutOfMemoryError, match=r"2\.0 MB are allowed"):
        run(folder, tmp_path / "run", filter_only=filter_only)
    monkeypatch.setattr(device_memory, "backend", lambda: "cpu")
    with pytest.raises(OutOfMemoryError, match=r"1\.8 MB are allowed"):
        run(folder, tmp_path / "run", filter_only=filter_only)
    assert not state_file(tmp_path / "run").exists()


def test_options_without_effect_are_named_once(folder, tmp_path):
    _, notes = run(folder, tmp_path / "run", data="text.jsonl", filter_samples=3, valid_every=2, epsilon_high=0.3)
    assert [note for note in notes if note.startswith("without effect")] == [
        "without effect: --filter-samples, as they are for --filter-only",
        "without effect: --valid-every, as there are no rows to validate on (--valid)",
        "without effect: --epsilon-high, as with one update per batch every ratio is 1",
    ]
    with pytest.raises(mlxvr.ConfigError, match="revision 'v1' is of a Hub id"):
        run(folder, tmp_path / "other", model=None, revision="v1")


def test_validation_and_the_best_adapter_go_by_the_users_reward(folder, tmp_path, monkeypatch, capsys):
    """The paper's reward of a random model is 0; the user's own is the figure, and its name is told."""
    (tmp_path / "own_module3.py").write_text("def ten(text, row):\n    return 10.0 + len(text)\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = {"valid": folder / "text.jsonl", "data": "text.jsonl", "reward": ("own_module3:ten",)}
    report, notes = run(folder, tmp_path / "run", **options)
    assert report.valid[1]["valid_reward"] >= 10.0
    assert report.reward == "own_module3:ten"
    assert "validation rewards, and so which adapter is best, are those of own_module3:ten" in notes
    argv = {"model": folder / "model", "data": folder / "text.jsonl", "valid": folder / "text.jsonl", "steps": 1}
    argv |= {"output": tmp_path / "told", "reward": "own_module3:ten", "group-size": 2, "max-completion-tokens": 3}
    assert main([str(part) for name, value in argv.items() for part in (f"--{name}", value)]) == 0
    assert "best by reward (1" in capsys.readouterr().out
    assert main([str(part) for name, value in argv.items() for part in (f"--{name}", value)][:-2]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_an_image_takes_no_more_tokens_than_the_flag_says(folder):
    """The checkpoint's own processor file allows 1,024."""
    model = load_model(folder / "model")
    for tokens, most in ((None, 1024), (300, 300)):
        config = TrainConfig(data=Path("rows.jsonl"), output=Path("run"), image_tokens=tokens)
        assert frame_spec(config, model).image_max_tokens == most
    with pytest.raises(ConfigError, match="image_tokens"):
        TrainConfig(data=Path("rows.jsonl"), output=Path("run"), image_tokens=0)
