"""A training run: bit for bit the same after a kill, stopped by Ctrl-C and by what is not a number, read from files."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxvr
from mlxvr.dataset import load_rows
from mlxvr.errors import CheckpointError, ConfigError, DataError, OutOfMemoryError
from mlxvr.grpo.config import TrainConfig
from mlxvr.grpo.learning import Learner
from mlxvr.grpo.order import batches
from mlxvr.grpo.state import state_file
from mlxvr.grpo.trainer import train
from mlxvr.reasoner import demo_folder
from mlxvr.train import _history, main, make_parser, read_config

CLIPS = demo_folder() / "clips.jsonl"
SMALL = {
    "data": CLIPS,
    "dtype": "float32",
    "batch_size": 2,
    "group_size": 3,
    "max_completion_tokens": 48,
    "temperature": 1.5,
    "learning_rate": 1e-3,
}
FIGURES = {
    *("loss", "kl", "clip_share", "grad_norm", "learning_rate", "entropy", "zero_variance"),
    *("reward", "reward_std", "first", "second", "format", "fallback", "first_accuracy", "second_accuracy"),
    *("think_ratio", "tokens_mean", "tokens_max", "truncated"),
    *("tokens_per_second", "rollout_seconds", "update_seconds", "peak_memory"),
}


def run(output, on_note=None, **changes):
    return train(TrainConfig(**{**SMALL, "output": output, **changes}), on_note=on_note)


def entries(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def flags(**settings):
    told = {**SMALL, **settings}
    return [part for name, value in told.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def start(*argv):
    """A training process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mlxvr.train", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(mlxvr.__file__).parents[1])},
    )


def wait_for_step(output, step, process, seconds=120):
    """Until a step is in the journal."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        assert process.poll() is None, process.stderr.read()
        file = output / "metrics.jsonl"
        if file.exists() and any(json.loads(line)["step"] >= step for line in file.read_text().splitlines()[:-1]):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come within {seconds} s")


def exact(output):
    """All that has to be the same bit for bit."""
    timed = {"tokens_per_second", "rollout_seconds", "update_seconds", "peak_memory"}
    told = [{name: value for name, value in entry.items() if name not in timed} for entry in entries(output)]
    arrays = mx.load(str(state_file(output)))
    return told, {name: np.array(array) for name, array in arrays.items()}


def test_ten_steps_are_five_a_kill_and_the_rest(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, steps=10)
    process = start(*flags(output=cut, steps=10, save_every=5))
    wait_for_step(cut, 6, process)  # beyond what was saved
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if not state_file(cut).exists():
        pytest.fail("nothing was saved after step 5")
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')  # a line that the kill cut off
    assert main(["--resume", "--output", str(cut)]) == 0
    told, arrays = exact(whole)
    again, found = exact(cut)
    assert [entry["step"] for entry in told] == list(range(1, 11))
    assert again == told
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert any(entry["grad_norm"] > 0 for entry in told)
    assert (cut / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()


def test_the_view_of_a_run_that_goes_on_begins_with_the_steps_before(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "reward": 1.0}}\n' for step in range(1, 7)))
    config = TrainConfig(data=CLIPS, output=tmp_path, resume=True)
    assert [entry["step"] for entry in _history(config, {"step": 6})] == [1, 2, 3, 4, 5]
    assert _history(dataclasses.replace(config, resume=False), {"step": 6}) == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_saves(tmp_path, stop):
    process = start(*flags(output=tmp_path / "run", steps=500))
    wait_for_step(tmp_path / "run", 1, process)
    process.send_signal(stop)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "stopping after this step" in stderr
    assert "--resume" in stdout
    done = entries(tmp_path / "run")[-1]["step"]
    report = run(tmp_path / "run", steps=done + 1, resume=True)
    assert report.steps == done + 1
    assert [entry["step"] for entry in entries(tmp_path / "run")] == list(range(1, done + 2))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Settings of a run that measures itself twice and saves itself only then, and that run without a stop."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "valid.jsonl").write_text("\n".join(CLIPS.read_text().splitlines()[:3]))
    settings = {"valid": folder / "valid.jsonl", "media_root": demo_folder(), "valid_every": 2, "steps": 3}
    run(folder / "whole", **settings)
    return settings, exact(folder / "whole")


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("is_hard", [False, True])
def test_stopped_while_it_measures_nothing_is_lost(tmp_path, measured, at, is_hard):
    """The first Ctrl-C waits for a validation's row, not for all of them; the second ends at once."""
    settings, (told, arrays) = measured
    seen, before = [], {1: 0, 2: 2, 3: 3}[at]  # steps done at each validation

    def watch(stage, done, total):
        seen.append((stage, done))
        if is_hard and seen.count(("validate", 1)) == at:
            raise KeyboardInterrupt

    config = TrainConfig(**{**SMALL, **settings, "output": tmp_path})
    if is_hard:
        with pytest.raises(KeyboardInterrupt):
            train(config, progress=watch)
    else:
        report = train(config, progress=watch, should_stop=lambda: seen.count(("validate", 1)) == at)
        assert report.stopped
        assert report.steps == before
        assert seen[-1] == ("validate", 1)
    assert [entry["step"] for entry in entries(tmp_path)] == list(range(before))
    is_saved = before > 0 or not is_hard
    assert state_file(tmp_path).exists() == is_saved
    report = run(tmp_path, **settings, resume=is_saved)
    assert (report.steps, report.stopped) == (3, False)
    again, found = exact(tmp_path)
    assert again == told
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_what_was_measured_before_training_is_recorded_once(tmp_path, measured, monkeypatch):
    settings, (told, _) = measured

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "sample", fail)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **settings)
    run(tmp_path, **settings, resume=True)
    assert exact(tmp_path)[0] == told


def test_what_is_no_number_stops_the_run(tmp_path, monkeypatch, capsys):
    """Rewards so large that their mean overflows: the rows are named, and the weights are those before."""
    output = tmp_path / "run"
    lines = "import itertools", "turns = itertools.cycle([8e307, 1.6e308])", "reward = lambda text, row: next(turns)"
    (tmp_path / "huge.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*flags(output=output, steps=4, save_every=1), "--reward", "huge:reward"]) == 2
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


def test_an_adapter_that_is_loaded_answers_as_the_trained_model(tmp_path):
    """What was validated is what the saved adapter does, through the public API and its early exit."""
    rows = load_rows(CLIPS)[:6]
    valid = tmp_path / "valid.jsonl"
    lines = CLIPS.read_text().splitlines()[:6]
    valid.write_text("\n".join(lines))
    (tmp_path / "clips").symlink_to(demo_folder() / "clips")
    report = run(
        tmp_path / "run", steps=4, valid=valid, media_root=demo_folder(), threshold=0.9, max_completion_tokens=160
    )
    figures = report.valid[4]
    with mlxvr.load(adapter=tmp_path / "run", dtype="float32") as reasoner:
        answers = [
            reasoner.ask(row.video, row.text, options=row.options, kind=row.ask_kind, threshold=0.9, max_tokens=160)
            for row in rows
        ]
        bare = len(reasoner.open(rows[0].video).ask("Which colour?", threshold=0.9).token_ids)
    assert bare
    assert figures["valid_think_ratio"] == pytest.approx(np.mean([answer.reasoned for answer in answers]))
    confidences = [answer.confidence for answer in answers if answer.confidence is not None]
    assert figures["valid_confidence"] == pytest.approx(np.mean(confidences), abs=1e-4)
    assert figures["valid_tokens"] == pytest.approx(np.mean([len(answer.token_ids) for answer in answers]), abs=1.0)
    exact_rows = [(row, answer) for row, answer in zip(rows, answers) if row.kind == "exact_match"]
    if len(exact_rows) == len(rows):
        right = np.mean([answer.text == row.answer for row, answer in exact_rows])
        assert figures["valid_auto_accuracy"] == pytest.approx(right)
    assert report.best == tmp_path / "run" / "best"
    assert set(report.valid) == {0, 4}


def test_the_journal_has_every_figure(tmp_path):
    report = run(tmp_path / "run", steps=2)
    found = entries(tmp_path / "run")
    assert [entry["step"] for entry in found] == [1, 2]
    for entry in found:
        assert set(entry) >= FIGURES
        assert entry["learning_rate"] == pytest.approx(1e-3)
        assert entry["reward"] == pytest.approx(
            0.9 * entry["first"] + 1.1 * entry["second"] + entry["format"] + 0.3 * entry["fallback"], abs=1e-5
        )
    assert report.steps == 2
    assert not report.stopped
    assert json.loads(json.dumps(report.to_dict()))["steps"] == 2
    told = (tmp_path / "run" / "train_config.toml").read_text()
    assert "group_size = 3" in told


def test_rewards_of_ones_own_and_rows_without_answers(tmp_path, monkeypatch):
    """Mixed rows: labels where there are some, agreement elsewhere; and a function in the place of both."""
    rows = [json.loads(line) for line in CLIPS.read_text().splitlines()[:4]]
    del rows[1]["answer"], rows[3]["answer"]
    data = tmp_path / "mixed.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = {"data": data, "media_root": demo_folder(), "steps": 2}
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: .*answer"):
        run(tmp_path / "a", **options)
    run(tmp_path / "b", reward=("agreement", "coherence"), **options)
    figures = entries(tmp_path / "b")
    assert any(0.0 <= entry.get("agreement", -1.0) <= 1.0 for entry in figures)
    assert any(0.0 <= entry.get("coherence", -1.0) <= 1.0 for entry in figures)
    (tmp_path / "ours.py").write_text("def by_length(text, row):\n    return float(len(text) % 7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    run(tmp_path / "c", reward=("ours:by_length",), **options)
    figures = entries(tmp_path / "c")
    assert all(0.0 <= entry["reward"] <= 6.0 for entry in figures)
    assert all(entry["first"] is None for entry in figures)


def test_bad_rows_are_named_or_left_out(tmp_path):
    rows = [json.loads(line) for line in CLIPS.read_text().splitlines()[:3]]
    rows[1]["video"] = "clips/none.mp4"
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = {"data": data, "media_root": demo_folder(), "batch_size": 3, "steps": 1}
    with pytest.raises(mlxvr.MediaError, match=r"rows\.jsonl:2: .*none\.mp4.*--skip-bad-rows"):
        run(tmp_path / "a", **options)
    data.write_text("\n".join(["{", *map(json.dumps, rows), *["[]"] * 6]))
    notes = []
    report = run(tmp_path / "b", skip_bad_rows=True, **options, on_note=notes.append)
    assert list(report.skipped) == [rows[1]["id"]]
    assert entries(tmp_path / "b")[0]["rows"] == 2
    assert report.left_out == 7
    told = [note for note in notes if note.startswith("left out")]
    assert "rows.jsonl:1: " in told[0]
    assert told[5:] == ["left out: 2 rows more, 7 in all"]


def test_another_run_is_not_gone_on_with(tmp_path):
    output = tmp_path / "run"
    run(output, steps=1)
    with pytest.raises(ConfigError, match="holds a run already: go on with --resume"):
        run(output, steps=2)
    with pytest.raises(ConfigError, match=r"begun with seed 0, and now it is 1"):
        run(output, steps=2, resume=True, seed=1)
    with pytest.raises(CheckpointError, match="another model or adapter"):
        run(output, steps=2, resume=True, rank=4)
    with pytest.raises(ConfigError, match="holds no state to resume from"):
        run(tmp_path / "none", resume=True)
    state_file(output).write_bytes(b"\x10" + bytes(40))
    with pytest.raises(CheckpointError, match="cannot be read as the state"):
        run(output, steps=2, resume=True)


def test_training_goes_on_from_an_adapter(tmp_path):
    """Its distance is measured from the adapter that it began with: none before the first update."""
    run(tmp_path / "one", steps=2)
    run(tmp_path / "two", steps=2, adapter=tmp_path / "one", beta=0.1, skip_unanimous=False)
    first, second = entries(tmp_path / "two")
    assert first["kl"] == pytest.approx(0.0, abs=1e-9)
    assert second["kl"] > 0.0
    run(tmp_path / "two", steps=3, adapter=tmp_path / "one", beta=0.1, skip_unanimous=False, resume=True)
    assert [entry["step"] for entry in entries(tmp_path / "two")] == [1, 2, 3]


def test_filter_only(tmp_path, capsys):
    assert main([*flags(output=tmp_path / "kept", filter_samples=3, limit=4), "--filter-only", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"] == 4
    assert told["kept"] + told["never"] + told["always"] == 4
    kept = load_rows(tmp_path / "kept" / "kept.jsonl", media_root=told["media_root"] and Path(told["media_root"]))
    assert len(kept) == told["kept"]
    again = tmp_path / "kept" / "kept.jsonl"
    before = again.read_bytes()
    assert main([*flags(output=tmp_path / "kept", filter_samples=3, limit=4), "--filter-only", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sampled"] == 0
    assert again.read_bytes() == before


def test_what_cannot_fit_is_refused_before_it_starts(tmp_path):
    with pytest.raises(OutOfMemoryError, match=r"training needs about .* are allowed; what would lower it.*--g"):
        run(tmp_path / "run", steps=1, memory_limit=0.02)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_settings_from_files(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('data = "x.jsonl"\noutput = "run"\nlearning_rate = 1\nreward = ["agreement"]\ngroup_size = 4\n')
    parse = make_parser().parse_args
    config = read_config(parse(["--config", str(file), "--group-size", "6", "--no-scale-advantages"]))
    assert (config.learning_rate, config.group_size, config.reward) == (1.0, 6, ("agreement",))
    assert not config.scale_advantages
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


def test_losses_and_adapters_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="loss_type 'ppo' is unknown"):
        run(tmp_path / "run", data=tmp_path / "none.jsonl", loss_type="ppo")
    with pytest.raises(ConfigError, match="rank 0 is not positive"):
        run(tmp_path / "run", data=tmp_path / "none.jsonl", rank=0)
