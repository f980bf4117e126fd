"""Runs of the bundled checkpoint: what is generated, what is kept, and that neither stops nor processes change it.

Truth is the reasoner itself, asked row by row on clips that were just opened, and one run that nothing disturbed.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import change_small_module
from clips import write_clip

import mlxvr
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.data.rows import load_rows
from mlxvr.errors import ConfigError, DataError
from mlxvr.evaluation import generation, runner, sharding
from mlxvr.evaluation.eval_config import EvalConfig
from mlxvr.evaluation.generation import digest, group_rows
from mlxvr.evaluation.report import plots
from mlxvr.evaluation.samples import Sample, SampleWriter, decide, read_run, read_samples, write_samples
from mlxvr.runtime.distributed import ProcessGroup

DTYPE = "float32"  # a CPU computes bfloat16 many times slower
THRESHOLD = 0.97
MAX_TOKENS = 110  # enough for all but the row without a clip, which the model cannot answer


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    """They take seconds, and are the report's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "have_matplotlib", lambda: False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips with two questions each, apart in the file; a broken clip, text alone, and too long a question."""
    root = tmp_path_factory.mktemp("data")
    (root / "clips").mkdir()
    records = [json.loads(line) for line in (demo_folder() / "clips.jsonl").read_text().splitlines()]
    chosen = [one for one in records if one["video"] in ("clips/clip00.mp4", "clips/clip02.mp4")]
    assert len(chosen) == 4
    for name in {one["video"] for one in chosen}:
        shutil.copy(demo_folder() / name, root / name)
    (root / "clips" / "broken.mp4").write_bytes((root / chosen[0]["video"]).read_bytes()[:2000])
    rows = [chosen[0], chosen[2], chosen[1], chosen[3]]
    rows.insert(1, {**chosen[0], "id": "broken-0", "video": "clips/broken.mp4"})
    rows.insert(4, {**chosen[0], "id": "broken-1", "video": "clips/broken.mp4"})
    rows.insert(2, {**chosen[0], "id": "long", "question": "Where? " * 3000})
    rows.append({"id": "text", "question": "What is 2 + 2?", "answer": "4", "kind": "math"})
    write_rows(root / "rows.jsonl", rows)
    return root


@pytest.fixture(scope="module")
def reasoner():
    with mlxvr.load(dtype=DTYPE) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nothing disturbed."""
    return run(folder / "rows.jsonl", tmp_path_factory.mktemp("whole"))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(data, output, **options):
    return EvalConfig(**{"data": data, "output": output, "dtype": DTYPE, "max_tokens": MAX_TOKENS, **options})


def run(data, output, **options):
    return runner.evaluate(config(data, output, **options))


def samples_of(report):
    return {sample.id: untimed(sample) for sample in read_samples(report.samples)}


def untimed(sample):
    return replace(sample, first_seconds=0, total_seconds=0, prefill_seconds=0, media_seconds=0)


@pytest.mark.slow
def test_each_sample_is_what_the_reasoner_says(folder, reasoner, whole):
    found = samples_of(whole)
    rows = {row.id: row for row in load_rows(folder / "rows.jsonl")}
    assert list(rows) == [row["id"] for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines())]
    assert set(found) == set(rows)
    asked = [row for row in rows.values() if found[row.id].error is None]
    assert len(asked) == 5
    for row in asked:
        sample = found[row.id]
        options = {"options": row.options, "kind": row.ask_kind, "max_tokens": MAX_TOKENS}
        with reasoner.open(row.video) as clip:
            think = clip.ask(row.question, mode="think", **options)
        with reasoner.open(row.video) as clip:
            direct = clip.ask(row.question, mode="direct", **options)
        assert (sample.first, sample.second, sample.reasoning) == (think.first, think.second, think.reasoning)
        assert sample.total_tokens == len(think.token_ids)
        assert (sample.prompt_tokens, sample.video_tokens) == (think.usage.prompt_tokens, think.usage.video_tokens)
        assert sample.problems == think.problems
        assert sample.confidence == think.confidence
        if think.first is not None:
            assert (sample.first, sample.confidence) == (direct.text, direct.confidence)
            assert sample.first_tokens == len(direct.token_ids)
        assert (sample.question, sample.options, sample.answer) == (row.question, row.options, row.answer)
        assert (sample.media, sample.asked, sample.reasoned) == (row.media, digest(row), True)


def test_the_time_of_a_clip_is_counted_once(whole):
    timed = {sample.id: sample for sample in read_samples(whole.samples)}
    for first, second in (("clip00-0", "clip00-1"), ("clip02-0", "clip02-1")):
        assert timed[first].media_seconds > 0 == timed[second].media_seconds
        assert timed[first].prefill_seconds > timed[second].prefill_seconds > 0
        for name in (first, second):
            assert 0 < timed[name].first_seconds < timed[name].total_seconds


def test_what_is_broken_costs_its_own_rows(whole):
    errors = whole.summary.errors
    assert set(errors) == {"broken-0", "broken-1", "long"}
    assert "broken.mp4" in errors["broken-0"]
    assert "context is 8192" in errors["long"]
    assert all(error.count("\n") == 0 for error in errors.values())
    assert whole.summary.count == 8
    assert whole.summary.overall.count == 5
    assert whole.generated == 8


def test_a_live_run_does_what_the_threshold_decides(folder, whole, tmp_path):
    live = samples_of(run(folder / "rows.jsonl", tmp_path, live=True, threshold=THRESHOLD))
    decisions = set()
    for name, sample in samples_of(whole).items():
        assert live[name].error == sample.error
        if sample.error is None:
            decided = decide(sample, THRESHOLD)
            text = live[name].text if live[name].reasoned else live[name].first
            assert (text, live[name].reasoned) == (decided.text, decided.reasoned)
            assert live[name].total_tokens == decided.tokens
            assert live[name].confidence == sample.confidence
            decisions.add(decided.reasoned)
    assert decisions == {True, False}


@pytest.mark.slow
def test_neither_order_nor_grouping_changes_anything(folder, whole, tmp_path, monkeypatch):
    lines = (folder / "rows.jsonl").read_text().splitlines()
    other = folder / "reversed.jsonl"
    other.write_text("\n".join(reversed(lines)) + "\n")
    monkeypatch.setattr(runner, "group_rows", lambda rows: [(row,) for row in rows])
    report = run(other, tmp_path)
    assert samples_of(report) == samples_of(whole)
    assert list(samples_of(report)) == [json.loads(line)["id"] for line in reversed(lines)]
    one, another = report.summary.to_dict(), whole.summary.to_dict()
    for figures in (one, another):
        for mode in ("direct", "think", "auto"):
            figures["overall"][mode].pop("seconds")
    assert one["overall"] == another["overall"]


def test_rows_of_one_clip_are_grouped():
    rows = [
        generation.Row(id=name, question="?", answer="A", video=video and Path(video), start=start)
        for name, video, start in (
            ("a", "x", None),
            ("b", "y", None),
            ("c", "x", 1.0),
            ("d", "x", None),
            ("e", "", None),
        )
    ]
    assert [[row.id for row in group] for group in group_rows(rows)] == [["a", "d"], ["b"], ["c"], ["e"]]


def test_a_finished_run_generates_nothing_and_takes_labels_anew(folder, whole, tmp_path, monkeypatch):
    shutil.copytree(whole.output, tmp_path / "run")
    monkeypatch.setattr("mlxvr.data.prefetch.load_row", None)  # nothing is looked at
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()
    again = run(folder / "rows.jsonl", tmp_path / "run")
    assert again.generated == 0
    assert again.summary == whole.summary
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    right = samples_of(whole)["clip00-0"].first
    for row in rows:
        if row["id"] == "clip00-0":
            row["answer"] = next(letter for letter in "ABC" if letter != right)
    relabelled = run(write_rows(folder / "relabelled.jsonl", rows), tmp_path / "run")
    assert relabelled.generated == 0
    was, now = whole.summary.overall.direct.accuracy.value, relabelled.summary.overall.direct.accuracy.value
    assert was - now == pytest.approx(1 / 5)


def test_what_does_not_belong_together_is_refused(folder, whole, tmp_path):
    shutil.copytree(whole.output, tmp_path / "run")
    data = folder / "rows.jsonl"
    for options, says in (
        ({"max_tokens": 50}, "max_tokens 110 .now 50"),
        ({"fps": 1.0}, "fps"),
        ({"live": True}, "live_at"),
        ({"dtype": "bfloat16"}, "weights"),
        ({"model": change_small_module(shutil.copytree(demo_folder() / "checkpoint", tmp_path / "model"))}, "weights"),
    ):
        with pytest.raises(ConfigError, match=says):
            run(data, tmp_path / "run", **options)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for change in (
        {"question": "Which?"},
        {"start": 1.0},
        {"subtitles": "Hello."},
        {"response_prefix": "\\boxed{It is"},
    ):
        changed = write_rows(folder / "changed.jsonl", [rows[0] | change, *rows[1:]])
        with pytest.raises(ConfigError, match=r"changed.jsonl:1: row 'clip00-0' is asked otherwise"):
            run(changed, tmp_path / "run")
    writer = SampleWriter(tmp_path / "run" / "samples.jsonl", read_run(whole.samples))
    with writer, pytest.raises(ConfigError, match="another process"):
        run(data, tmp_path / "run")
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == whole.samples.read_bytes()


def test_rows_that_failed_are_asked_again_on_request(folder, whole, tmp_path):
    shutil.copytree(whole.output, tmp_path / "run")
    clips = tmp_path / "data"
    shutil.copytree(folder, clips)
    shutil.copy(clips / "clips" / "clip00.mp4", clips / "clips" / "broken.mp4")
    assert run(clips / "rows.jsonl", tmp_path / "run").generated == 0
    report = run(clips / "rows.jsonl", tmp_path / "run", retry_errors=True)
    assert report.generated == 3
    assert set(report.summary.errors) == {"long"}
    found = samples_of(report)
    assert found["broken-0"].first == found["clip00-0"].first
    assert {name: found[name] for name in found if name[:6] != "broken"} == {
        name: sample for name, sample in samples_of(whole).items() if name[:6] != "broken"
    }


def test_memory_that_runs_out_costs_a_row(folder, tmp_path, monkeypatch):
    from mlxvr.model.prefix import Prefix

    calls = []
    extend = Prefix.extend

    def fail_first(self, *args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("[metal::malloc] Attempting to allocate 1 bytes")
        return extend(self, *args, **options)

    monkeypatch.setattr(Prefix, "extend", fail_first)
    report = run(folder / "rows.jsonl", tmp_path, limit=4, max_tokens=4)
    assert "ran out of memory" in report.summary.errors["clip00-0"]
    assert set(report.summary.errors) == {"clip00-0", "broken-0", "long"}


def test_when_nothing_can_be_asked(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    broken = write_rows(folder / "broken.jsonl", [row for row in rows if row["id"].startswith("broken")])
    with pytest.raises(DataError, match=r"all 2 rows failed; the first: .*broken.mp4"):
        run(broken, tmp_path)


def test_limit_and_labels(folder, whole, tmp_path):
    shutil.copytree(whole.output, tmp_path / "run")
    report = run(folder / "rows.jsonl", tmp_path / "run", limit=2)
    assert (report.generated, report.summary.count) == (0, 2)
    unlabelled = [{"id": "u", "question": "What?"}]
    with pytest.raises(DataError, match="answer"):
        runner.read_questions(config(write_rows(folder / "unlabelled.jsonl", unlabelled), tmp_path))
    budget = config(folder / "unlabelled.jsonl", tmp_path, calibrate="ratio=0.5")
    assert [row.id for row in runner.read_questions(budget).rows] == ["u"]


def test_bad_rows_are_named_or_left_out(folder, tmp_path):
    data = folder / "bad.jsonl"
    data.write_text((folder / "rows.jsonl").read_text() + '{"id": "x"}\nnonsense\n')
    with pytest.raises(DataError, match=r"bad.jsonl:9: .*question"):
        runner.read_questions(config(data, tmp_path))
    questions = runner.read_questions(config(data, tmp_path, skip_bad_rows=True))
    assert len(questions.rows) == 8
    assert [note.split(": ")[0].split("/")[-1] for note in questions.notes] == ["bad.jsonl:9", "bad.jsonl:10"]


@pytest.mark.parametrize("budgets", [{}, {"video_tokens": 60}])
def test_a_benchmark_brings_its_budgets(tmp_path, budgets):
    """Charades: 2 frames a second, for Qwen3-VL 128,000 tokens a clip; a flag goes before."""
    root = tmp_path / "charades"
    (root / "videos").mkdir(parents=True)
    write_clip(root / "videos" / "AAAAA.mp4", frames=120, fps=30, size=(256, 256))
    (root / "charades_sta_test.txt").write_text("AAAAA 0.5 2.0##the ball is seen.\nBBBBB 0.5 2.0##nothing.\n")
    report = runner.evaluate(
        EvalConfig(task="charades", data_root=root, output=tmp_path / "run", dtype=DTYPE, max_tokens=8, **budgets)
    )
    [sample] = read_samples(report.samples)
    assert (sample.kind, sample.media) == ("iou", "videos/AAAAA.mp4")
    # 8 frames in 4 pairs, 256 pixels a side, 32 to a token: 64 tokens a pair; within 60 a pair has 16, the least
    assert sample.video_tokens == (4 * 16 if budgets else 4 * 64)
    total, *listed = report.notes
    assert "1 left out because of 1 missing video (BBBBB.mp4)" in total
    assert listed == ["BBBBB.mp4: the video is missing"]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_benchmark_is_told_what_the_public_evaluator_tells(tmp_path, workers):
    """Its copy of the system prompt ends with one more newline, a token of its own here; a data file gets none."""
    root = tmp_path / "charades"
    (root / "videos").mkdir(parents=True)
    rows = []
    for name in ("AAAAA", "BBBBB"):
        write_clip(root / "videos" / f"{name}.mp4", frames=60, fps=30, size=(64, 64))
        rows.append({"id": f"{name}-{len(rows) + 1}", "video": f"videos/{name}.mp4", "question": "the ball is seen."})
        rows[-1] |= {"answer": [0.5, 2.0], "kind": "iou"}
    (root / "charades_sta_test.txt").write_text(
        "".join(f"{row['id'][:5]} 0.5 2.0##the ball is seen.\n" for row in rows)
    )
    benchmark = runner.evaluate(
        EvalConfig(
            task="charades", data_root=root, output=tmp_path / "a", dtype=DTYPE, max_tokens=4, fps=2.0, workers=workers
        )
    )
    own = run(write_rows(root / "rows.jsonl", rows), tmp_path / "b", max_tokens=4, fps=2.0, workers=workers)
    before, after = samples_of(own), samples_of(benchmark)
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].video_tokens == before[name].video_tokens
        assert after[name].prompt_tokens == before[name].prompt_tokens + 1


@pytest.mark.slow
def test_frames_in_a_folder_and_an_image(tmp_path, reasoner):
    from PIL import Image

    (tmp_path / "frames").mkdir()
    for number in range(6):
        Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(tmp_path / "frames" / f"{number}.png")
    rows = [
        {"id": "folder", "video": "frames", "frames_fps": 3.0, "question": "What?", "answer": "A"},
        {
            "id": "part",
            "video": "frames",
            "frames_fps": 3.0,
            "start": 0.0,
            "end": 0.9,
            "question": "What?",
            "answer": "A",
        },
        {"id": "image", "image": "frames/1.png", "question": "What?", "answer": "A"},
        {"id": "none", "video": "clips", "frames_fps": 3.0, "question": "What?", "answer": "A"},
    ]
    report = run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", max_tokens=4)
    found = samples_of(report)
    frames = sorted(str(path) for path in (tmp_path / "frames").iterdir())
    for name, part in (("folder", {}), ("part", {"start": 0.0, "end": 0.9})):
        expected = reasoner.open(frames, fps=3.0, **part).ask("What?", max_tokens=4).usage
        assert found[name].video_tokens == expected.video_tokens
    assert found["part"].video_tokens < found["folder"].video_tokens
    assert found["image"].video_tokens > 0
    assert "is not a folder of jpg or png frames" in found["none"].error


# Stopping and going on


CODE = """
import signal
import sys
from pathlib import Path
from mlxvr.evaluation.eval_config import EvalConfig
from mlxvr.evaluation.runner import evaluate

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what was started in the background
    data, output, workers = sys.argv[1:]
    config = EvalConfig(data=Path(data), output=Path(output), dtype="float32", max_tokens=110, workers=int(workers))
    asked = []
    report = evaluate(config, progress=lambda stage, *_: asked.append(stage))
    print(report.rank, report.generated, asked.count("evaluate"))
"""


def start(data, output, *, workers=1, **environment):
    script = output.parent / "evaluation_script.py"
    script.write_text(CODE)
    return subprocess.Popen(
        [sys.executable, str(script), str(data), str(output), str(workers)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(process, output, least):
    """Until so many samples are in the folder's files."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = sum(path.read_bytes().count(b"\n") - 1 for path in output.glob("samples*.jsonl") if path.stat().st_size)
        if lines >= least:
            return
        time.sleep(0.005)
    pytest.fail(f"no samples came: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_gone_on(folder, whole, tmp_path, how):
    output = tmp_path / "run"
    process = start(folder / "rows.jsonl", output)
    wait_for_lines(process, output, 2)
    process.send_signal(how)
    process.communicate(timeout=300)
    assert process.returncode != 0
    kept = (output / "samples.jsonl").read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    there = kept.count(b"\n") - 1
    assert 2 <= there < 8
    report = run(folder / "rows.jsonl", output)
    assert report.generated == 8 - there
    assert (output / "samples.jsonl").read_bytes().startswith(kept)
    assert samples_of(report) == samples_of(whole)


@pytest.mark.slow
def test_two_ranks_are_as_one(folder, whole, tmp_path):
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1], other.getsockname()[1]]
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    output = tmp_path / "run"
    # An earlier run with more ranks was stopped: it has left one row of rank 2, and one of rank 0.
    done = {sample.id: sample for sample in read_samples(whole.samples)}
    write = {"samples.rank2.jsonl": ["text"], "samples.jsonl": ["clip02-1"]}
    output.mkdir()
    for name, ids in write.items():
        write_samples(output / name, read_run(whole.samples), [done[one] for one in ids])
    ranks = [start(folder / "rows.jsonl", output, MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts)) for rank in range(2)]
    told = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
    ranks, generated, asked = zip(*(out.split() for out, _ in told))
    assert (ranks, generated) == (("0", "1"), ("6", "6"))
    assert all(0 < int(count) < 6 for count in asked), "both have done a part of it"
    assert sum(map(int, asked)) == 6
    assert [path.name for path in output.glob("samples*")] == ["samples.jsonl"]
    report = run(folder / "rows.jsonl", output)
    assert report.generated == 0
    assert samples_of(report) == samples_of(whole)
    assert list(samples_of(report)) == [row.id for row in load_rows(folder / "rows.jsonl")]


def test_two_workers_are_as_one(folder, whole, tmp_path):
    seen = []
    report = runner.evaluate(
        config(folder / "rows.jsonl", tmp_path / "run", workers=2), progress=lambda *told: seen.append(told)
    )
    assert samples_of(report) == samples_of(whole)
    assert [told for told in seen if told[0] == "evaluate"][-1] == ("evaluate", 8, 8)
    assert [path.name for path in (tmp_path / "run").glob("samples*")] == ["samples.jsonl"]


@pytest.mark.slow
def test_workers_end_with_their_parent(folder, whole, tmp_path):
    output = tmp_path / "run"
    process = start(folder / "rows.jsonl", output, workers=2)
    wait_for_lines(process, output, 2)
    process.kill()
    process.communicate(timeout=300)  # returns when the last process that holds the pipe has ended
    known = {sample.id for path in output.glob("samples*.jsonl") for sample in read_samples(path)}
    report = run(folder / "rows.jsonl", output)
    assert report.generated == 8 - len(known)
    assert samples_of(report) == samples_of(whole)


def fail(shard, step):
    """A worker's work."""
    step()
    if shard == 1:
        raise ConfigError("nothing works")
    if shard == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if shard == 3:
        raise ZeroDivisionError("oh")
    time.sleep(60)


@pytest.mark.parametrize(
    ("shard", "error", "says"),
    [
        (1, ConfigError, "nothing works"),
        (2, ConfigError, "killed by signal 9"),
        (3, RuntimeError, "ZeroDivisionError: oh"),
    ],
)
def test_what_happens_to_a_worker_is_told(shard, error, says):
    with sharding.workers(0, fail) as pool:
        pool.start_worker(shard, fail)
        with pytest.raises(error, match=says):
            pool.wait(lambda: None)
    assert pool.steps == 1


def test_a_sample_that_did_not_fail_goes_first(tmp_path):
    run = {"model": "m"}
    good, bad = (
        Sample(id="a", kind="math", first=first, error=error) for first, error in (("1", None), (None, "broken"))
    )
    write_samples(tmp_path / "samples.jsonl", run, [bad])
    write_samples(tmp_path / "samples.rank1.jsonl", run, [good])
    write_samples(tmp_path / "samples.rank2.jsonl", run, [bad])
    assert sharding.collect(tmp_path, run, ProcessGroup()) == {"a": good}
    with pytest.raises(ConfigError, match="other settings"):
        sharding.collect(tmp_path, {"model": "n"}, ProcessGroup())
