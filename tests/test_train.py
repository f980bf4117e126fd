"""A training run: bit for bit the same after a kill, stopped by Ctrl-C and by what is not a number, read from files.

What concerns only the run is shown with a small random model (`small_runs.py`), what concerns answers with the bundled
one.
"""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import change_small_module
from small_runs import CLIPS, command, entries, exact, flags, make_settings, run

import mlxvr
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.data.rows import load_rows
from mlxvr.errors import CheckpointError, ConfigError, DataError, OutOfMemoryError
from mlxvr.grpo.data_order import batches
from mlxvr.grpo.step.policy_update import PolicyUpdater
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.grpo.train_state import state_file
from mlxvr.train import _history, main, make_parser, read_config

FIGURES = {
    *("loss", "kl", "clip_ratio/region_mean", "grad_norm", "learning_rate", "entropy", "frac_reward_zero_std"),
    *(
        "reward",
        "reward_std",
        "rewards/first/mean",
        "rewards/second/mean",
        "rewards/format/mean",
        "rewards/fallback/mean",
        "first_accuracy",
        "second_accuracy",
    ),
    *("think_ratio", "completions/mean_length", "completions/max_length", "completions/clipped_ratio"),
    *("tokens_per_second", "rollout_seconds", "update_seconds", "peak_memory"),
}
# Of the bundled checkpoint, under the paper's reward.
BUNDLED = {
    "reward": (),
    "max_completion_tokens": 48,
    "max_frames": None,
    "video_tokens": None,
    "temperature": 1.5,
    "rank": 16,
}


def write_rows(folder, count, *, start=0):
    """The first bundled rows in a file of their own; its media are found with `media_root`."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(CLIPS.read_text().splitlines()[start : start + count]))
    return path


@pytest.mark.parametrize("bundled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_six_steps_are_three_a_kill_and_the_rest(tmp_path, small_model, start_process, bundled):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    model = demo_folder() / "checkpoint" if bundled else small_model
    how = {"steps": 6, "save_every": 3}
    if bundled:
        how |= {name: value for name, value in BUNDLED.items() if value}
    settings = make_settings(model, cut, **how)
    run(whole, model, **how)
    process = start_process(command(tmp_path / "notes", settings, stop="SIGKILL", at=5))  # beyond what was saved
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, stderr
    assert [entry["step"] for entry in entries(cut)] == [1, 2, 3, 4]
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # a line that the kill cut off
    assert main(["--resume", "--output", str(cut)]) == 0
    assert exact(cut) == exact(whole)
    assert [entry["step"] for entry in entries(whole)] == list(range(1, 7))
    assert all(entry["grad_norm"] > 0 for entry in entries(whole)), "every step changes something"
    assert (cut / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()


def test_the_view_of_a_run_that_goes_on_begins_with_the_steps_before(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "reward": 1.0}}\n' for step in range(1, 7)))
    config = TrainConfig(data=CLIPS, output=tmp_path, resume=True)
    assert [entry["step"] for entry in _history(config, {"step": 6})] == [1, 2, 3, 4, 5]
    assert _history(dataclasses.replace(config, resume=False), {"step": 6}) == []


@pytest.mark.parametrize("stop", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_ctrl_c_finishes_the_step_and_saves(tmp_path, small_model, start_process, stop):
    output = tmp_path / "run"
    settings = make_settings(small_model, output, steps=500, save_every=500)
    process = start_process(command(tmp_path / "notes", settings, stop=stop, at=2))
    stdout, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "stopping after this step" in stderr
    assert "--resume" in stdout
    assert [entry["step"] for entry in entries(output)] == [1, 2]
    report = run(output, small_model, steps=3, save_every=500, resume=True)
    assert report.steps == 3
    assert [entry["step"] for entry in entries(output)] == [1, 2, 3]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, small_model):
    """Settings of a run that measures itself twice and saves itself only then, and that run without a stop."""
    folder = tmp_path_factory.mktemp("measured")
    settings = {"valid": write_rows(folder, 3), "media_root": demo_folder(), "valid_every": 2, "steps": 3}
    run(folder / "whole", small_model, **settings)
    return settings, exact(folder / "whole")


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("is_hard", [False, True])
def test_stopped_while_it_measures_nothing_is_lost(tmp_path, small_model, measured, at, is_hard):
    """The first Ctrl-C waits for a validation's row, not for all of them; the second ends at once."""
    settings, whole = measured
    seen, before = [], {1: 0, 2: 2, 3: 3}[at]  # steps done at each validation

    def watch(stage, done, total):
        seen.append((stage, done))
        if is_hard and seen.count(("validate", 1)) == at:
            raise KeyboardInterrupt

    if is_hard:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, small_model, progress=watch, **settings)
    else:
        stop = lambda: seen.count(("validate", 1)) == at  # noqa: E731
        report = run(tmp_path, small_model, progress=watch, should_stop=stop, **settings)
        assert report.stopped
        assert report.steps == before
        assert seen[-1] == ("validate", 1)
    assert [entry["step"] for entry in entries(tmp_path)] == list(range(before))
    is_saved = before > 0 or not is_hard
    assert state_file(tmp_path).exists() == is_saved
    report = run(tmp_path, small_model, **settings, resume=is_saved)
    assert (report.steps, report.stopped) == (3, False)
    assert exact(tmp_path) == whole


def test_what_was_measured_before_training_is_recorded_once(tmp_path, small_model, measured, monkeypatch):
    settings, whole = measured

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PolicyUpdater, "sample", fail)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, small_model, **settings)
    run(tmp_path, small_model, **settings, resume=True)
    assert exact(tmp_path) == whole


def test_what_is_no_number_stops_the_run(tmp_path, small_model, monkeypatch, capsys):
    """Rewards so large that their mean overflows: the rows are named, and the weights are those before."""
    output = tmp_path / "run"
    lines = "import itertools", "turns = itertools.cycle([8e307, 1.6e308])", "reward = lambda text, row: next(turns)"
    (tmp_path / "huge.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    assert main(flags(make_settings(small_model, output, steps=4, save_every=1, reward="huge:reward"))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    failed = json.loads((output / "failed_batch.json").read_text())
    rows = load_rows(CLIPS)
    batch = batches(len(rows), batch_size=2, seed=0, epoch=0)[failed["step"] - 1]
    assert [row["id"] for row in failed["rows"]] == [rows[index].id for index in batch]
    assert all(row["id"] in error for row in failed["rows"])
    assert "lower the learning rate" in error
    assert [entry["step"] for entry in entries(output)] == list(range(1, failed["step"]))
    saved = {name: np.array(array) for name, array in mx.load(str(state_file(output))).items()}
    assert all(np.isfinite(array).all() for array in saved.values())


@pytest.mark.slow
def test_an_adapter_that_is_loaded_answers_as_the_trained_model(tmp_path):
    """What was validated is what the saved adapter does, through the public API and its early exit."""
    data, steps = write_rows(tmp_path, 6), 4
    rows = load_rows(data, media_root=demo_folder())
    how = {"valid": data, "media_root": demo_folder(), "threshold": 0.9, "max_completion_tokens": 160}
    settings = {**BUNDLED, "reward": make_settings(None, None)["reward"], "group_size": 2, "batch_size": 1, **how}
    report = run(tmp_path / "run", None, steps=steps, **settings)
    figures = report.valid[steps]
    with mlxvr.load(adapter=tmp_path / "run", dtype="float32") as reasoner:
        answers = [
            reasoner.ask(row.video, row.text, options=row.options, kind=row.ask_kind, threshold=0.9, max_tokens=160)
            for row in rows
        ]
    assert figures["valid_think_ratio"] == pytest.approx(np.mean([answer.reasoned for answer in answers]))
    assert all(answer.confidence is not None for answer in answers)
    assert figures["valid_confidence"] == pytest.approx(np.mean([answer.confidence for answer in answers]), abs=1e-4)
    assert figures["valid_tokens"] == pytest.approx(np.mean([len(answer.token_ids) for answer in answers]), abs=1.0)
    assert {row.kind for row in rows} == {"exact_match"}
    right = np.mean([answer.text == row.answer for row, answer in zip(rows, answers)])
    assert figures["valid_auto_accuracy"] == pytest.approx(right)
    assert report.best == tmp_path / "run" / "best"
    assert set(report.valid) == {0, steps}


def test_the_journal_has_every_figure(tmp_path):
    """The bundled model under the paper's reward, with weights of its parts that are nobody's default."""
    weights = {"first_weight": 0.5, "second_weight": 0.7, "format_weight": 0.25, "fallback_weight": 0.1}
    report = run(tmp_path / "run", None, steps=2, **{**BUNDLED, **weights, "batch_size": 1})
    found = entries(tmp_path / "run")
    assert [entry["step"] for entry in found] == [1, 2]
    for entry in found:
        assert set(entry) >= FIGURES
        assert entry["learning_rate"] == pytest.approx(1e-3)
        assert entry["reward"] == pytest.approx(
            0.5 * entry["rewards/first/mean"]
            + 0.7 * entry["rewards/second/mean"]
            + 0.25 * entry["rewards/format/mean"]
            + 0.1 * entry["rewards/fallback/mean"],
            abs=1e-5,
        )
    assert any(entry["rewards/first/mean"] > 0 for entry in found)
    assert report.steps == 2
    assert not report.stopped
    assert json.loads(json.dumps(report.to_dict()))["steps"] == 2
    assert "group_size = 3" in (tmp_path / "run" / "train_config.toml").read_text()


def test_rewards_of_ones_own_and_rows_without_answers(tmp_path, small_model, monkeypatch):
    """Mixed rows: labels where there are some, agreement elsewhere; and a function in the place of both."""
    rows = [json.loads(line) for line in CLIPS.read_text().splitlines()[:2]]
    del rows[1]["answer"]
    data = tmp_path / "mixed.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = {"data": data, "media_root": demo_folder(), "steps": 1}
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: .*answer"):
        run(tmp_path / "a", small_model, reward=(), **options)
    run(tmp_path / "b", None, **{**BUNDLED, **options, "reward": ("agreement", "coherence"), "group_size": 2})
    (figures,) = entries(tmp_path / "b")
    assert 0.0 <= figures["rewards/agreement/mean"] <= 1.0
    assert 0.0 <= figures["rewards/coherence/mean"] <= 1.0
    (tmp_path / "ours.py").write_text("def by_length(text, row):\n    return float(len(text) % 7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    run(tmp_path / "c", small_model, reward=("ours:by_length",), **options)
    (figures,) = entries(tmp_path / "c")
    assert 0.0 < figures["reward"] <= 6.0
    assert figures["rewards/first/mean"] is None


def test_bad_rows_are_named_or_left_out(tmp_path, small_model):
    rows = [json.loads(line) for line in CLIPS.read_text().splitlines()[:3]]
    rows[1]["video"] = "clips/none.mp4"
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = {"data": data, "media_root": demo_folder(), "batch_size": 3, "steps": 1}
    with pytest.raises(mlxvr.MediaError, match=r"rows\.jsonl:2: .*none\.mp4.*--skip-bad-rows"):
        run(tmp_path / "a", small_model, **options)
    data.write_text("\n".join(["{", *map(json.dumps, rows), *["[]"] * 6]))
    notes = []
    report = run(tmp_path / "b", small_model, skip_bad_rows=True, **options, on_note=notes.append)
    assert list(report.skipped) == [rows[1]["id"]]
    assert entries(tmp_path / "b")[0]["rows"] == 2
    assert report.left_out == 7
    left_out = [note for note in notes if note.startswith("left out")]
    assert "rows.jsonl:1: " in left_out[0]
    assert left_out[5:] == ["left out: 2 rows more, 7 in all"]


def test_another_run_is_not_gone_on_with(tmp_path, small_model):
    output = tmp_path / "run"
    run(output, small_model, steps=1)
    with pytest.raises(ConfigError, match="holds a run already: continue it with --resume"):
        run(output, small_model, steps=2)
    with pytest.raises(ConfigError, match=r"begun with seed 0, and now it is 1"):
        run(output, small_model, steps=2, resume=True, seed=1)
    with pytest.raises(CheckpointError, match="another model or adapter"):
        run(output, small_model, steps=2, resume=True, rank=8)
    altered = change_small_module(shutil.copytree(small_model, tmp_path / "altered"))
    with pytest.raises(ConfigError, match=r"begun with weights"):
        run(output, altered, steps=2, resume=True)
    with pytest.raises(ConfigError, match="holds no state to resume from"):
        run(tmp_path / "none", small_model, resume=True)
    state_file(output).write_bytes(b"\x10" + bytes(40))
    with pytest.raises(CheckpointError, match="cannot be read as the state"):
        run(output, small_model, steps=2, resume=True)


def test_training_goes_on_from_an_adapter(tmp_path, small_model):
    """Its distance is measured from the adapter that it began with: none before the first update."""
    run(tmp_path / "one", small_model, steps=2)
    settings = {"adapter": tmp_path / "one", "beta": 0.1, "weight_decay": 0.0}  # only what is learned moves it
    run(tmp_path / "two", small_model, steps=2, **settings)
    first, second = entries(tmp_path / "two")
    assert first["kl"] == pytest.approx(0.0, abs=1e-9)
    assert second["kl"] > 1e-6
    run(tmp_path / "two", small_model, steps=3, **settings, resume=True)
    assert [entry["step"] for entry in entries(tmp_path / "two")] == [1, 2, 3]


def test_filter_only(tmp_path, capsys):
    settings = {**make_settings(None, tmp_path / "kept"), **BUNDLED, "filter_samples": 3, "limit": 2}
    argv = [*flags({name: value for name, value in settings.items() if value}), "--filter-only", "--json"]
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"] == 2
    assert told["sometimes"] + told["never"] + told["always"] == 2
    again = tmp_path / "kept" / "kept.jsonl"
    assert len(load_rows(again, media_root=told["media_root"] and Path(told["media_root"]))) == told["sometimes"]
    before = again.read_bytes()
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["sampled"] == 0
    assert again.read_bytes() == before


def test_what_cannot_fit_is_refused_before_it_starts(tmp_path, small_model):
    with pytest.raises(OutOfMemoryError, match=r"training needs about .* are allowed; what would lower it.*--g"):
        run(tmp_path / "run", small_model, steps=1, memory_limit=0.001)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_settings_from_files(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('data = "x.jsonl"\noutput = "run"\nlearning_rate = 1\nreward = ["agreement"]\ngroup_size = 4\n')
    parse = make_parser().parse_args
    config = read_config(parse(["--config", str(file), "--group-size", "6", "--no-scale-rewards"]))
    assert (config.learning_rate, config.group_size, config.reward) == (1.0, 6, ("agreement",))
    assert not config.scale_rewards
    with pytest.raises(ConfigError, match="there is no data: give --data"):
        read_config(parse(["--output", "run"]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"group_size": 1}, "group_size is 1: give at least 2"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: give a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"schedule": "linear"}, "schedule 'linear' is unknown: use constant or cosine"),
        ({"top_p": 1.2}, "top_p is 1.2: give a number from 0 to 1"),
        ({"report_to": ("mlflow",)}, "report_to names 'mlflow': use some of tensorboard, wandb"),
        ({"reward": ("a:b", "c:d")}, "reward names both a:b and c:d"),
        ({"plot": Path("x.pdf")}, r"plot is x.pdf: give a file that ends in .png or .svg"),
        ({"filter_only": True, "resume": True}, "leave resume out"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"steps": 0}, "steps is 0: give at least 1"),
        ({"seed": -1}, "seed is -1: give at least 0"),
    ],
)
def test_settings_that_cannot_be_used(changes, told):
    with pytest.raises(ConfigError, match=told):
        TrainConfig(data=Path("x"), output=Path("y"), **changes)


def test_losses_and_adapters_are_checked_before_anything_is_read(tmp_path, small_model):
    with pytest.raises(ConfigError, match="loss_type 'ppo' is unknown"):
        run(tmp_path / "run", small_model, data=tmp_path / "none.jsonl", loss_type="ppo")
    with pytest.raises(ConfigError, match="rank 0 is not positive"):
        run(tmp_path / "run", small_model, data=tmp_path / "none.jsonl", rank=0)
