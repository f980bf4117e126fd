"""Samples on disk: whole after a kill, refused when they would mix two runs."""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxvr.errors import ConfigError, DataError
from mlxvr.evaluation import samples as module
from mlxvr.evaluation.samples import Decision, Sample, SampleWriter, decide, ordered, read_run, read_samples

RUN = {"model": "demo", "max_tokens": 64, "budgets": {"fps": 2.0}}


def random_sample(name, rng):
    """A sample with every field filled or left out by chance."""

    def some(value):
        return value if rng.random() < 0.7 else None

    return Sample(
        id=name,
        kind=rng.choice(["exact_match", "math", "iou", "gqa"]),
        task=rng.choice(["", "count"]),
        question=rng.choice(["Wo?", "左边\u2028?", 'a "b"\\n\n']),
        options=tuple(rng.sample(["red", "blue", "{x}"], rng.randrange(3))),
        answer=rng.choice(["A", None, [[1.0, 2.5]], ["A", "B"]]),
        media=rng.choice(["", "clips/a.mp4", "caf\udce9.mp4"]),
        start=some(1.5),
        first=some("A"),
        confidence=some(rng.random()),
        second=some("B"),
        reasoning=some("r\n\t\0"),
        text="B",
        first_tokens=rng.randrange(10),
        total_tokens=rng.randrange(10, 100),
        total_seconds=rng.random(),
        problems=tuple(rng.sample(["no_think", "token_limit"], rng.randrange(2))),
        error=some("broken"),
    )


def some_samples(count, seed=0):
    rng = random.Random(seed)
    return [random_sample(f"row-{number}", rng) for number in range(count)]


def write_all(path, samples, run=RUN):
    with SampleWriter(path, run) as writer:
        for sample in samples:
            writer.write(sample)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "samples.jsonl"
    written = some_samples(200)
    write_all(path, written)
    assert read_samples(path) == written
    assert read_run(path) == RUN
    lines = path.read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[0]) == {"run": RUN}
    assert json.loads(lines[1]) == written[0].to_dict()


def test_a_run_goes_on(tmp_path):
    path = tmp_path / "samples.jsonl"
    written = some_samples(5)
    write_all(path, written[:3])
    with SampleWriter(path, RUN) as writer:
        assert writer.done == {"row-0", "row-1", "row-2"}
        for sample in written[3:]:
            writer.write(sample)
        assert writer.done == {sample.id for sample in written}
    assert read_samples(path) == written


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_cut_off_at_any_byte(tmp_path, step):
    """Whatever was left of the last line, the whole lines before it count and writing goes on behind them."""
    written = some_samples(3)
    write_all(tmp_path / "whole", written)
    whole = (tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    for size in range(0, len(whole) + 1, step):
        path.write_bytes(whole[:size])
        lines = whole[:size].count(b"\n")
        assert read_samples(path) == written[: max(0, lines - 1)]
        with SampleWriter(path, RUN) as writer:
            assert writer.done == {sample.id for sample in written[: max(0, lines - 1)]}
            for sample in written[max(0, lines - 1) :]:
                writer.write(sample)
        assert path.read_bytes() == whole


def test_what_is_left_of_a_long_line_is_gone(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_all(path, [Sample(id="long", kind="math", text="x" * 9000)])
    path.write_bytes(path.read_bytes()[:-1])
    write_all(path, [Sample(id="short", kind="math")])
    assert path.read_bytes().endswith(b"}\n")
    assert [sample.id for sample in read_samples(path)] == ["short"]


KILLED = """
import sys
from mlxvr.evaluation.samples import Sample, SampleWriter
with SampleWriter(sys.argv[1], {"model": "demo"}) as writer:
    number = len(writer.done)
    while True:
        writer.write(Sample(id=str(number), kind="math", text="x" * 5000))
        number += 1
        print(number, flush=True)
"""


def test_killed_while_it_writes(tmp_path):
    """After kill -9 every sample that was reported is there, and at most one more."""
    path = tmp_path / "samples.jsonl"
    reported = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(5):
            reported = int(process.stdout.readline())
        time.sleep(random.Random(reported).random() / 50)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")
        process.stdout.close()
        process.wait()
        reported = max([reported, *(int(line) for line in rest[:-1])])
        found = read_samples(path)
        assert [sample.id for sample in found] == [str(number) for number in range(len(found))]
        assert reported <= len(found) <= reported + 1
    with SampleWriter(path, {"model": "demo"}) as writer:
        assert len(writer.done) == len(found)


def test_each_line_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size) or fsync(file))
    path = tmp_path / "samples.jsonl"
    with SampleWriter(path, RUN) as writer:
        for sample in some_samples(3):
            writer.write(sample)
            assert synced[-1] == path.stat().st_size


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_all(path, some_samples(2))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"max_tokens 64 \(now 128\); use those, or choose another output folder"):
        SampleWriter(path, RUN | {"max_tokens": 128})
    with pytest.raises(ConfigError, match=r"seed None \(now 0\)"):
        SampleWriter(path, RUN | {"seed": 0})
    assert path.read_bytes() == before
    SampleWriter(path, {"budgets": {"fps": 2.0}, "max_tokens": 64, "model": "demo"}).close()


def test_a_file_of_another_kind_is_not_written(tmp_path):
    path = tmp_path / "notes"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(ConfigError, match="does not begin with the settings of a run"):
        SampleWriter(path, RUN)
    path.write_text("shopping\n")
    with pytest.raises(DataError, match="notes:1: no JSON"):
        SampleWriter(path, RUN)
    assert path.read_text() == "shopping\n"


def test_duplicates_are_refused(tmp_path):
    path = tmp_path / "samples.jsonl"
    sample = some_samples(1)[0]
    with SampleWriter(path, RUN) as writer:
        writer.write(sample)
        with pytest.raises(DataError, match="has a sample 'row-0' already"):
            writer.write(sample)
    path.write_bytes(path.read_bytes() + path.read_bytes().split(b"\n")[1] + b"\n")
    with pytest.raises(DataError, match=r"samples\.jsonl:3: the id 'row-0' is there twice"):
        read_samples(path)
    with pytest.raises(DataError, match="two samples have the id 'row-0'"):
        ordered([sample, sample])


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "samples.jsonl"
    with SampleWriter(path, RUN) as writer:
        with pytest.raises(ConfigError, match="another process is writing"):
            SampleWriter(path, RUN)
        writer.write(some_samples(1)[0])
    SampleWriter(path, RUN).close()


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    """Half a line gets through, then the disk is full; then there is room again."""
    path = tmp_path / "samples.jsonl"
    written = some_samples(3)
    pwrite = os.pwrite
    room = math.inf

    def limited(file, data, offset):
        if offset >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data[: int(min(len(data), room - offset))], offset)

    monkeypatch.setattr(module.os, "pwrite", limited)
    with SampleWriter(path, RUN) as writer:
        writer.write(written[0])
        before = path.read_bytes()
        room = len(before) + 20
        with pytest.raises(ConfigError, match=r"the disk of .* is full; free some space") as caught:
            writer.write(written[1])
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == before
        assert "row-1" not in writer.done
        room = math.inf
        writer.write(written[1])
    assert read_samples(path) == written[:2]


LIMITED = """
import resource, sys
from mlxvr.errors import ConfigError
from mlxvr.evaluation.samples import Sample, SampleWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
with SampleWriter(sys.argv[1], {}) as writer:
    try:
        for number in range(100):
            writer.write(Sample(id=str(number), kind="math", text="x" * 500))
    except ConfigError as error:
        print(len(writer.done), error)
"""


def test_a_file_that_may_not_grow(tmp_path):
    """The same with the system's own error."""
    path = tmp_path / "samples.jsonl"
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=300)
    count, said = done.stdout.split(" ", 1)
    assert "is full" in said, done.stderr
    assert path.stat().st_size <= 4000
    assert path.read_bytes().endswith(b"\n")
    assert len(read_samples(path)) == int(count) > 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"cannot be written \(Permission denied\)"):
        SampleWriter(tmp_path / "samples.jsonl", RUN)


def test_a_path_that_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be written \(Is a directory\)"):
        SampleWriter(tmp_path, RUN)
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
        read_samples(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2: no JSON \("),
        ("[]", r":2: a list; expected an object"),
        ('{"kind": "math"}', r":2: no sample \(.*'id'"),
        ('{"id": "", "kind": "math"}', r":2: no sample \(a sample's id is ''"),
        ('{"id": "a", "kind": "qa"}', r":2: no sample \(sample a: kind 'qa'; expected one of exact_match, math"),
        ('{"id": "a", "kind": "math", "confidence": 1.5}', r":2: no sample \(sample a: confidence 1\.5"),
        ('{"id": "a", "kind": "math", "confidence": "0.5"}', r":2: no sample"),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, message):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"run": {}}) + f"\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_samples(path)


def test_fields_of_a_later_version_are_passed_over(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"id": "a", "kind": "math", "colour": 1}\n\n')
    assert read_samples(path) == [Sample(id="a", kind="math")]
    assert read_run(path) == {}


@pytest.mark.parametrize("confidence", [math.nan, math.inf])
def test_what_is_no_number_is_no_confidence(confidence):
    assert Sample(id="a", kind="math", confidence=confidence).confidence is None


BOTH = Sample(
    id="a",
    kind="math",
    first="1",
    confidence=0.9,
    second="2",
    text="2",
    first_tokens=3,
    total_tokens=40,
    first_seconds=0.25,
    total_seconds=2.0,
)


@pytest.mark.parametrize(
    ("changes", "threshold", "decision"),
    [
        ({}, 0.9, Decision("1", 3, 0.25, False)),
        ({}, 0.9001, Decision("2", 40, 2.0, True)),
        ({}, 0.0, Decision("1", 3, 0.25, False)),
        ({"confidence": 1.0}, 1.0, Decision("1", 3, 0.25, False)),
        ({"confidence": None}, 0.0, Decision("2", 40, 2.0, True)),
        ({"second": None, "text": "1"}, 1.0, Decision("1", 40, 2.0, True)),
        ({"reasoned": False, "second": None}, 0.5, Decision("1", 3, 0.25, False)),
    ],
)
def test_decisions(changes, threshold, decision):
    assert decide(Sample(**{**vars(BOTH), **changes}), threshold) == decision


def test_a_live_run_does_not_know_what_it_would_have_reasoned():
    with pytest.raises(ConfigError, match=r"sample a stopped at its first answer \(live run\), so threshold 0.95"):
        decide(Sample(**{**vars(BOTH), "reasoned": False}), 0.95)


def test_ordered():
    many = some_samples(20)
    assert ordered(reversed(many)) == ordered(many) == sorted(many, key=lambda sample: sample.id)


def test_paths_may_be_texts(tmp_path):
    write_all(str(tmp_path / "samples.jsonl"), some_samples(1))
    assert len(read_samples(Path(tmp_path) / "samples.jsonl")) == 1
