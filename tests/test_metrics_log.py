"""The metrics of a training run: what is on the disk after every write, after a kill, and after going on."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest

from mlxvr.errors import ConfigError, DataError
from mlxvr.grpo.monitor.metrics_log import MetricsLog
from mlxvr.grpo.monitor.sinks import make_sinks


def read(folder):
    return (folder / "metrics.jsonl").read_text(encoding="utf-8")


class Recorder:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.told = []

    def write(self, entry):
        self.told.append(("write", dict(entry)))

    def rewind(self, step):
        self.told.append(("rewind", step))

    def close(self):
        self.told.append(("close",))


def test_lines_are_what_was_written(tmp_path):
    with MetricsLog(tmp_path / "a" / "run") as log:
        log.write({"step": 1, "loss": 0.25, "rows": ["Ж", "b"], "kl": None})
        assert read(tmp_path / "a" / "run") == '{"step": 1, "loss": 0.25, "rows": ["Ж", "b"], "kl": null}\n'
        log.write({"step": 2})
        assert log.entries() == [{"step": 1, "loss": 0.25, "rows": ["Ж", "b"], "kl": None}, {"step": 2}]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (float("nan"), "null"),
        (float("-inf"), "null"),
        (float(np.float32(0.3)), "0.3"),
        (np.float32(0.3), "0.3"),
        (np.int64(7), "7"),
        (1e-6, "1e-06"),
        (1 / 3, "0.3333333"),
        (-123456.789, "-123456.8"),
        (15_200_000_001.0, "15200000001.0"),
        (15_200_000_001, "15200000001"),
        (True, "true"),
        ([float("nan"), {"a": float(np.float32(0.1))}], '[null, {"a": 0.1}]'),
        ("a\udc80b", '"a\\udc80b"'),
    ],
)
def test_numbers_are_readable(tmp_path, value, written):
    with MetricsLog(tmp_path) as log:
        log.write({"x": value})
        assert read(tmp_path) == f'{{"x": {written}}}\n'
        assert log.entries() == [json.loads(f'{{"x": {written}}}')]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}'])
def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    with MetricsLog(tmp_path) as log:
        assert [entry["step"] for entry in log.entries()] == [1, 2]
        log.write({"step": 9})
        assert read(tmp_path) == '{"step": 1}\n{"step": 2}\n{"step": 9}\n'


def test_killed_after_a_write_nothing_is_lost(tmp_path):
    code = (
        "import os, sys, pathlib; from mlxvr.grpo.monitor.metrics_log import MetricsLog\n"
        "log = MetricsLog(pathlib.Path(sys.argv[1]))\n"
        "for step in range(1, 4): log.write({'step': step})\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=300).returncode == -9
    with MetricsLog(tmp_path) as log:
        assert [entry["step"] for entry in log.entries()] == [1, 2, 3]


def test_every_line_is_synced(tmp_path, monkeypatch):
    sizes = []
    sync = os.fsync
    with MetricsLog(tmp_path) as log:
        monkeypatch.setattr(os, "fsync", lambda file: (sizes.append(os.fstat(file).st_size), sync(file)))
        log.write({"step": 1})
        log.write({"step": 2})
    assert sizes == [len('{"step": 1}\n'), 2 * len('{"step": 1}\n')]


def test_rewind_drops_what_came_after(tmp_path):
    with MetricsLog(tmp_path) as log:
        for entry in ({"step": 0, "valid_reward": 1}, {"step": 1}, {"said": "x"}, {"step": 2}, {"step": 3}):
            log.write(entry)
        before = os.stat(log.path).st_ino
        log.rewind(3)
        assert os.stat(log.path).st_ino == before
        log.rewind(1)
        assert log.entries() == [{"step": 0, "valid_reward": 1}, {"step": 1}, {"said": "x"}]
        log.write({"step": 2, "again": True})
        assert read(tmp_path).endswith('{"said": "x"}\n{"step": 2, "again": true}\n')
        log.rewind(-1)
        assert log.entries() == [{"said": "x"}]
        assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_a_rewind_that_fails_leaves_everything(tmp_path, monkeypatch):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1})
        log.write({"step": 2})

        def fail(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(ConfigError, match=r"No space left|is full"):
                log.rewind(0)
        assert [entry["step"] for entry in log.entries()] == [1, 2]
        log.write({"step": 3})
        assert [entry["step"] for entry in log.entries()] == [1, 2, 3]


def test_a_write_that_fails_leaves_whole_lines(tmp_path, monkeypatch):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1})

        def fail(_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(ConfigError, match=r"the disk of .*metrics\.jsonl is full; free some space"):
                log.write({"step": 2})
        assert read(tmp_path) == '{"step": 1}\n'


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n')
    with MetricsLog(tmp_path) as log, pytest.raises(DataError, match=r"metrics\.jsonl:2: no JSON"):
        log.entries()
    (tmp_path / "metrics.jsonl").write_text("[1]\n")
    with MetricsLog(tmp_path) as log, pytest.raises(DataError, match=r"metrics\.jsonl:1: a list; expected an object"):
        log.rewind(0)


def test_one_process_writes(tmp_path):
    with MetricsLog(tmp_path) as log:
        with pytest.raises(ConfigError, match="another process is writing"):
            MetricsLog(tmp_path)
        log.write({"step": 1})
        log.write({"step": 2})
        log.rewind(1)  # the new file is held too
        with pytest.raises(ConfigError, match="another process is writing"):
            MetricsLog(tmp_path)
    log.close()
    MetricsLog(tmp_path).close()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        MetricsLog(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="cannot be written"):
        make_sinks([], tmp_path / "file" / "run", {})


def test_sinks_get_what_the_file_gets(tmp_path):
    sink = Recorder()
    with MetricsLog(tmp_path, sinks=[sink]) as log:
        log.write({"step": 1, "loss": float("nan"), "kl": np.float32(0.3)})
        log.rewind(0)
    log.close()
    assert sink.told == [("write", {"step": 1, "loss": None, "kl": 0.3}), ("rewind", 0), ("close",)]


def test_a_sink_that_fails_is_left_out(tmp_path, caplog):
    class Broken(Recorder):
        def write(self, entry):
            raise RuntimeError("network is down")

    other = Recorder()
    with MetricsLog(tmp_path, sinks=[Broken(), other]) as log:
        log.write({"step": 1})
        log.write({"step": 2})
        assert len(log.entries()) == 2
    assert [one[0] for one in other.told] == ["write", "write", "close"]
    assert caplog.messages == [
        f"Broken gets no more metrics (network is down); {tmp_path / 'metrics.jsonl'} has all of them"
    ]


@pytest.fixture
def tensorboard(monkeypatch):
    """A `tensorboardX` that keeps the calls of its writers, one list a writer."""
    writers = []

    class SummaryWriter:
        def __init__(self, logdir, purge_step=None, filename_suffix=""):
            self.calls = [("open", logdir, purge_step, filename_suffix)]
            writers.append(self.calls)

        def __getattr__(self, name):
            return lambda *values: self.calls.append((name, *values))

    module = ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    return writers


def test_tensorboard(tmp_path, tensorboard):
    sinks = make_sinks(["tensorboard", "tensorboard"], tmp_path, {"rank": 16})
    assert len(sinks) == 1
    with MetricsLog(tmp_path, sinks=sinks) as log:
        log.write({"step": 1, "loss": 0.5, "kl": None, "rows": ["a"], "ok": True, "valid_reward": 2.5})
    (calls,) = tensorboard
    assert calls[0] == ("open", str(tmp_path / "tensorboard"), None, "")
    assert calls[1][:2] == ("add_text", "config")
    assert json.loads(calls[1][2].strip("`\n")) == {"rank": 16}
    assert calls[2:] == [
        ("add_scalar", "train/loss", 0.5, 1),
        ("add_scalar", "valid/reward", 2.5, 1),
        ("flush",),
        ("close",),
    ]


def test_tensorboard_hides_what_is_trained_again(tmp_path, tensorboard):
    with MetricsLog(tmp_path, sinks=make_sinks(["tensorboard"], tmp_path, {})) as log:
        log.write({"step": 8, "loss": 1.0})
        log.rewind(5)
        log.write({"step": 6, "loss": 1.0})
    first, second = tensorboard
    assert first[-1] == ("close",)
    # the second file begins at 6, and is not the first one of the same second
    assert second[0] == ("open", str(tmp_path / "tensorboard"), 6, ".1")
    assert ("add_scalar", "train/loss", 1.0, 6) in second


@pytest.fixture
def wandb(monkeypatch):
    """A `wandb` that keeps the arguments of `init` and the calls of its runs."""
    module = ModuleType("wandb")
    module.calls = []

    class Run:
        def __getattr__(self, name):
            return lambda *values, **named: module.calls.append((name, *values, *named.items()))

    def init(**named):
        module.calls.append(("init", named))
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_goes_on_with_the_same_run(tmp_path, wandb):
    for step in (1, 2):
        with MetricsLog(tmp_path, sinks=make_sinks(["wandb"], tmp_path, {"rank": 16})) as log:
            log.write({"step": step, "loss": 0.5, "kl": None, "rows": ["a"]})
    found = (tmp_path / "wandb_id").read_text().strip()
    assert len(found) == 8
    init = {"project": "mlxvr", "dir": str(tmp_path), "config": {"rank": 16}, "id": found, "resume": "allow"}
    assert wandb.calls == [
        call
        for step in (1, 2)
        for call in (
            ("init", init),
            ("define_metric", "step"),
            ("define_metric", "*", ("step_metric", "step")),
            ("log", {"step": step, "loss": 0.5}),
            ("finish",),
        )
    ]
    make_sinks(["wandb"], tmp_path / "other", {})
    assert wandb.calls[-3][1]["id"] != found


def test_wandb_that_does_not_start(tmp_path, wandb, tensorboard):
    def fail(**_):
        raise RuntimeError("api_key not configured")

    wandb.init = fail
    with pytest.raises(ConfigError, match=r"api_key not configured.*wandb login.*WANDB_MODE=offline"):
        make_sinks(["tensorboard", "wandb"], tmp_path, {})


@pytest.mark.parametrize(
    ("name", "module", "said"),
    [("tensorboard", "tensorboardX", "pip install tensorboardX"), ("wandb", "wandb", "pip install wandb")],
)
def test_a_package_that_is_absent(tmp_path, monkeypatch, name, module, said):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=said):
        make_sinks([name], tmp_path, {})


def test_a_place_that_is_not_known(tmp_path):
    with pytest.raises(ConfigError, match="'mlflow' is no place for metrics: expected tensorboard or wandb"):
        make_sinks(["mlflow"], tmp_path, {})


def test_tensorboard_shows_the_figures(tmp_path):
    """With the real packages: a step that was trained again has its new figure only."""
    pytest.importorskip("tensorboardX")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, sinks=make_sinks(["tensorboard"], tmp_path, {"rank": 16})) as log:
        for step in range(1, 9):
            log.write({"step": step, "loss": float(step)})
        log.rewind(5)
        log.write({"step": 6, "loss": 60.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [
        *((step, float(step)) for step in range(1, 6)),
        (6, 60.0),
    ]


WRITE_WANDB = """
import sys
from pathlib import Path
from mlxvr.grpo.monitor.metrics_log import MetricsLog
from mlxvr.grpo.monitor.sinks import make_sinks

folder, step = Path(sys.argv[1]), int(sys.argv[2])
with MetricsLog(folder, sinks=make_sinks(["wandb"], folder, {"rank": "16"})) as log:
    log.write({"step": step, "reward": step / 4, "completions/mean_length": 12.0, "kl": None, "rows": ["a"]})
"""

READ_WANDB = """
import json, struct, sys
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record

def records(data):  # LevelDB's log format after 7 bytes: blocks of 32 KiB of (checksum, length, kind) and content
    place, content = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        content += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(content)
            content = b""

for file in sorted(Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")):
    for record in records(file.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            print(json.dumps({"run": record.run.run_id, "project": record.run.project, "rank": config["rank"]}))
        if kind == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            print(json.dumps({name: value for name, value in items.items() if not name.startswith("_")}))
"""


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_has_the_metrics(tmp_path):
    """With the real package, offline: a run that is resumed in another process has the same id there."""
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path / "home")}
    for code, step in ((WRITE_WANDB, 1), (WRITE_WANDB, 2), (READ_WANDB, 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run"), str(step)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    run_id = (tmp_path / "run" / "wandb_id").read_text().strip()
    run = {"run": run_id, "project": "mlxvr", "rank": "16"}
    shown = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [entry for entry in shown if "run" in entry] == [run, run]
    assert [entry for entry in shown if "step" in entry] == [
        {"step": step, "reward": step / 4, "completions/mean_length": 12} for step in (1, 2)
    ]
