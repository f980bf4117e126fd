"""A conversion that is stopped anywhere: the target is absent or complete, and the next run ends in the same bytes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from mlxvr.conversion import shards
from mlxvr.conversion.quantize import convert
from mlxvr.errors import CheckpointError, ConfigError

# Converts with shards of 30 kB and kills itself at the n-th of all operations that change the disk.
DIES_AT = """
import os, signal, sys
from pathlib import Path

import mlxvr.conversion.shards as shards
from mlxvr.conversion import tensor_plan
from mlxvr.conversion.quantize import convert

operations = 0

def counted(function):
    def call(*args, **options):
        global operations
        operations += 1
        if operations == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call

tensor_plan.plan_shards = lambda groups: shards.plan_shards(groups, 30_000)
os.fsync = counted(os.fsync)
Path.rename = counted(Path.rename)
Path.unlink = counted(Path.unlink)
shards.ShardWriter.append = counted(shards.ShardWriter.append)
convert(sys.argv[1], sys.argv[2], bits=4, group_size=32)
print(operations)
"""


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source", "qwen3_vl", dtype="BF16", shards=2)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("mlxvr.conversion.tensor_plan.plan_shards", lambda groups: shards.plan_shards(groups, 30_000))


def run(source: Path, out: Path, dies_at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DIES_AT, str(source), str(out), str(dies_at)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the card, whose title is the folder's name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.mark.parametrize(
    "parts", [(0.01, 0.97), pytest.param((0.01, 0.3, 0.55, 0.8, 0.97, 1.0), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_killed_between_any_two_writes(source, tmp_path, small_shards, parts):
    whole = run(source, tmp_path / "whole", 0)
    total = int(whole.stdout)
    expected = contents(tmp_path / "whole")
    assert len([name for name in expected if name.endswith(".safetensors")]) > 3
    kept = []
    for part in parts:
        out = tmp_path / f"out{part}"
        killed = run(source, out, max(1, int(part * total)))
        assert killed.returncode == -signal.SIGKILL
        assert not out.exists() or contents(out) == expected
        if out.exists():
            continue
        partial = tmp_path / f".out{part}.mlxvr-partial"
        before = {path.name: path.stat().st_ino for path in partial.glob("model-*.safetensors")}
        report = convert(source, out, bits=4, group_size=32)
        kept.append(report.resumed_shards)
        assert report.resumed_shards == len(before)
        assert {name: (out / name).stat().st_ino for name in before} == before  # not one of them was written again
        assert contents(out) == expected
        assert not partial.exists()
    assert kept[0] == 0
    assert kept == sorted(kept)
    assert kept[-1] > 1


def stop_after(fraction: float):
    def progress(stage: str, done: int, total: int) -> None:
        if done > fraction * total:
            raise KeyboardInterrupt

    return progress


def interrupted(source: Path, out: Path, **options: object) -> Path:
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=stop_after(0.6), **options)
    return out.with_name(f".{out.name}.mlxvr-partial")


def test_ctrl_c_keeps_what_is_finished_and_says_where(source, tmp_path, small_shards, caplog):
    partial = interrupted(source, tmp_path / "out")
    finished = list(partial.glob("model-*.safetensors"))
    assert finished
    assert f"{len(finished)} finished shards wait in {partial}: run again to go on, or remove it" in caplog.text
    assert not list(partial.glob("*.json"))
    assert convert(source, tmp_path / "out").resumed_shards == len(finished)


def test_what_is_finished_is_not_read_again(source, tmp_path, small_shards):
    interrupted(source, tmp_path / "out")
    first: list[int] = []
    report = convert(source, tmp_path / "out", progress=lambda stage, done, total: first.append(done))
    assert report.resumed_shards > 0
    assert first[0] > report.bytes_before * 0.3  # the bar begins where the work does
    assert first[-1] == report.bytes_before


@pytest.mark.parametrize("other", [{"bits": 8}, {"group_size": 32}, {"dtype": "float16"}, {"mode": "mxfp4"}])
def test_another_conversion_to_the_same_target_begins_anew(other, source, tmp_path, small_shards):
    interrupted(source, tmp_path / "out")
    assert convert(source, tmp_path / "out", **other).resumed_shards == 0
    convert(source, tmp_path / "fresh", **other)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_source_that_changed_begins_anew(source, tmp_path, small_shards):
    interrupted(source, tmp_path / "out")
    changed = write_checkpoint(tmp_path / "source", "qwen3_vl", dtype="BF16", shards=2, seed=1)
    assert convert(changed, tmp_path / "out").resumed_shards == 0


def test_a_finished_shard_that_lost_its_end_is_written_again(source, tmp_path, small_shards):
    partial = interrupted(source, tmp_path / "out")
    finished = sorted(partial.glob("model-*.safetensors"))
    os.truncate(finished[0], finished[0].stat().st_size - 1)
    report = convert(source, tmp_path / "out")
    assert report.resumed_shards == len(finished) - 1
    convert(source, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_full_disk_keeps_finished_shards(source, tmp_path, small_shards, monkeypatch):
    append, left = shards.ShardWriter.append, [60]

    def fills_up(self, name, rows):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        append(self, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "append", fills_up)
        with pytest.raises(ConfigError, match="is full; free some space and run again"):
            convert(source, tmp_path / "out")
    assert convert(source, tmp_path / "out").resumed_shards > 0


def test_a_damaged_source_leaves_nothing(tmp_path, small_shards):
    def spoil(name, array):
        if name.endswith("norm.weight"):
            array = array.copy()
            array.flat[3] = float("nan")
        return array

    folder = write_checkpoint(tmp_path / "source", "qwen3_vl", weights=spoil)
    with pytest.raises(CheckpointError, match="NaN"):
        convert(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_read_only_folder_is_one_line(source, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):  # root may write anywhere: ask for a place where nobody may
        locked = Path("/proc")
    with pytest.raises(ConfigError, match="cannot write"):
        convert(source, locked / "out")


def test_the_plan_does_not_travel(source, tmp_path):
    convert(source, tmp_path / "out")
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert json.loads((tmp_path / "out" / "mlxvr.json").read_text())["quantization"]["bits"] == 4
