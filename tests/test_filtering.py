"""Filtering by difficulty: what is dropped, that a kill at any point costs nothing, and that the output loads again."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from groups import stir, tiny_model

from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.data.rows import Row, load_rows
from mlxvr.errors import Cancelled, ConfigError, DataError, MediaError
from mlxvr.grading import math_equality
from mlxvr.grading.reward import Reward, score
from mlxvr.grpo.filter_report import FilterReport
from mlxvr.grpo.filtering import FilterConfig, make_sampler, progress_file
from mlxvr.grpo.filtering import filter_rows as filter_configured
from mlxvr.grpo.setup import read_training_rows
from mlxvr.grpo.step.lora import attach, save_adapter
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.grpo.step.prompts import encode_row
from mlxvr.grpo.step.rollout import rollout
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.grpo.trainer import train
from mlxvr.model.loading import load_model
from mlxvr.runtime.hooks import Hooks
from mlxvr.train import main

RIGHT, WRONG = "\\boxed{B}<think>So.</think>\\boxed{A}", "\\boxed{A}<think>So.</think>\\boxed{B}"
ONE_MORE = "\\boxed{A}<think>So.</think>"  # the first answer is right, and there is no second


def text_rows(count):
    return [
        Row(id=f"r{number}", question=f"Is it {number}?", options=("yes", "no"), answer="A", line=f"d.jsonl:{number}")
        for number in range(count)
    ]


class Scripted:
    """A sampler that is right as often as a table says, in an order that the seed decides."""

    def __init__(self, table, samples=8):
        self.table, self.samples, self.asked = table, samples, []

    def __call__(self, row, seed):
        self.asked.append((row.id, seed))
        right = self.table[row.id]
        texts = [RIGHT] * right + [WRONG] * (self.samples - right)
        random.Random(seed).shuffle(texts)
        return texts


def filter_rows(model, rows, output, *, sampler=None, progress=None, should_stop=None, **options):
    """`filter_rows` with the fields of its config as keywords."""
    hooks = Hooks(progress, should_stop)
    return filter_configured(model, rows, output, FilterConfig(**options), sampler=sampler, hooks=hooks)


def without_place(rows):
    return [replace(row, line="") for row in rows]


@pytest.fixture(scope="module")
def demo():
    return load_model(demo_folder() / "checkpoint")


def test_completions_of_a_model(demo, monkeypatch):
    """One rollout a row, asked for what was set."""
    asked = {}

    def encode_row(model, row, **options):
        asked["encode"] = (model, row, options)
        return "prompt"

    def rollout(model, prompt, sampling, **options):
        asked["rollout"] = (model, prompt, sampling, options)
        return SimpleNamespace(texts=[RIGHT, RIGHT, "", "cut"])

    monkeypatch.setitem(sys.modules, "mlxvr.grpo.step.prompts", SimpleNamespace(encode_row=encode_row))
    monkeypatch.setitem(sys.modules, "mlxvr.grpo.step.rollout", SimpleNamespace(rollout=rollout))
    (row,) = text_rows(1)
    sampling = SamplingConfig(max_tokens=7, temperature=0.5, top_p=0.9)
    config = FilterConfig(samples=4, sampling=sampling, max_prompt_tokens=99, prefill_step_size=33)
    texts = make_sampler(demo, config)(row, 12)
    assert texts == [RIGHT, RIGHT, "", "cut"]
    assert asked["encode"] == (demo, row, {"spec": demo.spec, "max_prompt_tokens": 99, "should_stop": None})
    drawn = {"group_size": 4, "prefill_step_size": 33, "should_stop": None}
    assert asked["rollout"] == (demo, "prompt", replace(sampling, seed=12), drawn)


@pytest.mark.slow
def test_the_bundled_model(demo, tmp_path):
    """The default sampler with the real rollout: clips of the bundled world, twice the same."""
    rows = load_rows(demo_folder() / "clips.jsonl")[:4]
    options = {"samples": 4, "sampling": SamplingConfig(max_tokens=96, temperature=1.0, seed=3), "threshold": 0.5}
    rates = {}
    for row in rows:
        seed = int.from_bytes(hashlib.sha256(f"3/{row.id}".encode()).digest()[:4])
        prompt = encode_row(demo, row, spec=demo.spec)
        made = rollout(demo, prompt, SamplingConfig(max_tokens=96, temperature=1.0, top_p=1.0, seed=seed), group_size=4)
        texts = [demo.tokenizer.decode(one.ids.tolist()).replace("<|im_end|>", "") for one in made.completions]
        most = 2 if row.kind == "gqa" else 1
        rates[row.id] = sum(score(text, row.answer, row.kind).second >= 0.5 * most for text in texts)
    kept = [row.id for row in rows if 0 < rates[row.id] < 4]
    output = tmp_path / "k.jsonl"
    if not kept:
        with pytest.raises(DataError, match="no row is left"):
            filter_rows(demo, rows, output, **options)
    else:
        report = filter_rows(demo, rows, output, **options)
        assert [row.id for row in load_rows(output, media_root=report.media_root)] == kept
    lines = [json.loads(line) for line in progress_file(output).read_text().splitlines()]
    assert lines[0]["run"]["weights"] == demo.fingerprint
    found = {
        one["id"]: sum(second >= (1 if row.kind == "gqa" else 0.5) for second in one["second"])
        for one, row in zip(lines[1:], rows)
    }
    assert found == rates


def test_never_and_always_are_dropped(tmp_path):
    rows = text_rows(9)
    sampler = Scripted({f"r{number}": number for number in range(9)})
    output = tmp_path / "kept.jsonl"
    report = filter_rows(None, rows, output, samples=8, sampler=sampler)
    assert report == FilterReport(
        output=output,
        progress=tmp_path / "kept.progress.jsonl",
        media_root=None,
        samples=8,
        threshold=0.7,
        total=9,
        sometimes=7,
        never=1,
        always=1,
        unlabelled=0,
        failed=(),
        sampled=9,
    )
    assert without_place(load_rows(output)) == without_place(rows[1:8])
    rates = [json.loads(line)["pass_rate"] for line in output.read_text().splitlines()]
    assert rates == [number / 8 for number in range(1, 8)]
    assert "7 of 9 rows kept" in report.describe()
    assert "1 dropped as never right and 1 as right 8 times of 8" in report.describe()
    assert json.loads(json.dumps(report.to_dict()))["sometimes"] == 7


def test_only_the_second_answer_counts(tmp_path):
    """Two of three completions have a right first answer; one has a right second."""
    rows = text_rows(2)
    texts = {"r0": [RIGHT, WRONG, ONE_MORE], "r1": [WRONG, ONE_MORE, WRONG]}
    report = filter_rows(None, rows, tmp_path / "k.jsonl", samples=3, sampler=lambda row, seed: texts[row.id])
    assert (report.sometimes, report.never) == (1, 1)
    assert json.loads((tmp_path / "k.jsonl").read_text())["pass_rate"] == 1 / 3


def grounded(first, start, end):
    return f"\\boxed{{x}}<think>So.</think>\\boxed{{{first}[{start}, {end}]}}"


@pytest.mark.parametrize(
    ("threshold", "rates"),
    # IoU of [0, 8], [0, 5] and [20, 30] with [0, 10]: 0.8, 0.5, 0. With the answer right, wrong, right: 1.8, 0.5, 1.
    [(0.7, {"i": 1 / 3, "g": 1 / 3}), (0.5, {"i": 2 / 3, "g": 2 / 3}), (0.25, {"i": 2 / 3}), (0.9, {"g": 1 / 3})],
)
def test_what_is_right_of_moments(tmp_path, threshold, rates):
    """The IoU is held against the threshold, of grounded answers the half of their sum."""
    (tmp_path / "a.mp4").touch()
    moment = Row(id="i", question="he runs", answer=[[0.0, 10.0]], kind="iou", video=tmp_path / "a.mp4", line="d:1")
    both = replace(moment, id="g", options=("x", "y"), answer=["A", [[0.0, 10.0]]], kind="gqa", line="d:2")
    texts = {
        "i": [grounded("", 0, 8), grounded("", 0, 5), grounded("", 20, 30)],
        "g": [grounded("A <> ", 0, 8), grounded("B <> ", 0, 5), grounded("A <> ", 20, 30)],
    }
    output = tmp_path / "k.jsonl"
    filter_rows(None, [moment, both], output, samples=3, threshold=threshold, sampler=lambda row, _: texts[row.id])
    found = {record["id"]: record["pass_rate"] for record in map(json.loads, output.read_text().splitlines())}
    assert found == rates
    assert [row.answer for row in load_rows(output)] == [row.answer for row in (moment, both) if row.id in rates]


def test_rows_without_an_answer_are_kept_unasked(tmp_path):
    rows = [*text_rows(2), Row(id="u", question="What?", answer=None, line="d:3")]
    sampler = Scripted({"r0": 1, "r1": 0})
    report = filter_rows(None, rows, tmp_path / "k.jsonl", sampler=sampler)
    assert (report.sometimes, report.never, report.unlabelled) == (1, 1, 1)
    assert [name for name, _ in sampler.asked] == ["r0", "r1"]
    assert [row.id for row in load_rows(tmp_path / "k.jsonl", labelled=False)] == ["r0", "u"]


def test_seeds_hang_on_the_row_alone(tmp_path):
    def seeds(rows, name, seed=0):
        sampler = Scripted({row.id: 1 for row in rows})
        filter_rows(
            None,
            rows,
            tmp_path / name,
            sampler=sampler,
            sampling=SamplingConfig(max_tokens=2_048, temperature=1.0, seed=seed),
        )
        return dict(sampler.asked)

    rows = text_rows(20)
    found = seeds(rows, "a.jsonl")
    assert len(set(found.values())) == 20
    assert all(0 <= seed < 2**32 for seed in found.values())
    assert seeds(rows[::-2], "b.jsonl") == {row.id: found[row.id] for row in rows[::-2]}
    assert not set(seeds(rows, "c.jsonl", seed=1).values()) & set(found.values())


def test_cut_off_at_any_byte(tmp_path):
    """Whatever a kill leaves of the progress, the output is the same, and whole lines are not sampled again."""
    rows, table = text_rows(4), {"r0": 3, "r1": 0, "r2": 8, "r3": 1}
    output = tmp_path / "k.jsonl"
    filter_rows(None, rows, output, sampler=Scripted(table))
    expected, whole = output.read_bytes(), progress_file(output).read_bytes()
    for size in range(len(whole) + 1):
        output.unlink()
        progress_file(output).write_bytes(whole[:size])
        sampler = Scripted(table)
        report = filter_rows(None, rows, output, sampler=sampler)
        left = 4 - max(0, whole[:size].count(b"\n") - 1)
        assert report.sampled == len(sampler.asked) == left
        assert output.read_bytes() == expected
        assert progress_file(output).read_bytes() == whole


KILLED = """
import json, sys, time
from pathlib import Path
from test_filtering import Scripted, text_rows
from mlxvr.grpo.filtering import filter_rows

class Slow(Scripted):
    def __call__(self, row, seed):
        texts = super().__call__(row, seed)
        print(row.id, flush=True)
        time.sleep(0.01)
        return texts

filter_rows(None, text_rows(30), Path(sys.argv[1]), sampler=Slow({f"r{n}": n % 9 for n in range(30)}))
"""


def test_killed_while_it_works(tmp_path):
    """kill -9 again and again: no row that was done is sampled again, and the output is that of an unbroken run."""
    output, whole = tmp_path / "k.jsonl", tmp_path / "whole.jsonl"
    filter_rows(None, text_rows(30), whole, sampler=Scripted({f"r{n}": n % 9 for n in range(30)}))
    asked = []
    for kill in (4, 7, 11, None):
        assert not output.exists()
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(output)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        )
        lines = [process.stdout.readline().strip() for _ in range(kill or 0)]
        if kill:
            time.sleep(0.001 * kill)
            process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().split()
        process.stdout.close()
        process.wait()
        asked.append([name for name in lines if name])
    assert process.returncode == 0
    assert output.read_bytes() == whole.read_bytes()
    assert progress_file(output).read_bytes() == progress_file(whole).read_bytes()
    for before, after in pairwise(asked):  # at most the row that was being worked on comes again
        assert after[0] in (before[-1], f"r{int(before[-1][1:]) + 1}")


def test_the_threshold_may_change(tmp_path):
    (tmp_path / "a.mp4").touch()
    row = Row(id="i", question="he runs", answer=[[0.0, 10.0]], kind="iou", video=tmp_path / "a.mp4", line="d:1")
    texts = [grounded("", 0, 8), grounded("", 0, 5)]
    output = tmp_path / "k.jsonl"
    assert filter_rows(None, [row], output, samples=2, sampler=lambda *_: texts).sometimes == 1
    with pytest.raises(DataError, match=r"no row is left of 1: 0 of 1 rows kept in .*; 1 dropped as never"):
        filter_rows(None, [row], output, samples=2, threshold=0.9, sampler=lambda *_: 1 / 0)
    assert len(load_rows(output)) == 1  # the old output stays
    assert filter_rows(None, [row], output, samples=2, threshold=0.6, sampler=lambda *_: 1 / 0).sampled == 0


def test_other_settings_are_refused(tmp_path):
    output, rows = tmp_path / "k.jsonl", text_rows(1)
    filter_rows(None, rows, output, sampler=Scripted({"r0": 1}))
    with pytest.raises(ConfigError, match=r"samples 8 \(now 4\); use those, or choose another output folder"):
        filter_rows(None, rows, output, samples=4, sampler=Scripted({"r0": 1}, samples=4))
    with pytest.raises(ConfigError, match=r"temperature 1\.0 \(now 0\.5\)"):
        filter_rows(
            None, rows, output, sampler=Scripted({}), sampling=SamplingConfig(max_tokens=2_048, temperature=0.5, seed=0)
        )


def test_a_row_that_was_changed_is_sampled_again(tmp_path):
    output, rows = tmp_path / "k.jsonl", text_rows(3)
    table = {"r0": 1, "r1": 1, "r2": 1}
    filter_rows(None, rows, output, sampler=Scripted(table))
    rows[1] = replace(rows[1], answer="B")
    report = filter_rows(None, [*rows[::-1], *text_rows(4)[3:]], output, sampler=Scripted({**table, "r3": 2}))
    assert report.sampled == 2
    assert [(row.id, row.answer) for row in load_rows(output)] == [("r2", "A"), ("r1", "B"), ("r0", "A"), ("r3", "A")]


def media_rows(*paths):
    return [
        Row(id=f"m{number}", question="What?", answer="A", video=path, media=path.name, line=f"d:{number}")
        for number, path in enumerate(paths)
    ]


def keep_all(rows, output, **options):
    return filter_rows(None, rows, output, sampler=Scripted({row.id: 1 for row in rows}), **options)


def test_media_beside_the_output(tmp_path):
    rows = media_rows(tmp_path / "clips" / "a.mp4", tmp_path / "b.mp4", tmp_path / "x" / ".." / "c.mp4")
    report = keep_all(rows, tmp_path / "k.jsonl")
    assert report.media_root is None
    assert [row.media for row in load_rows(tmp_path / "k.jsonl")] == ["clips/a.mp4", "b.mp4", "c.mp4"]
    assert [row.video.resolve() for row in load_rows(tmp_path / "k.jsonl")] == [row.video.resolve() for row in rows]


def test_media_elsewhere_need_a_root(tmp_path, monkeypatch):
    rows = media_rows(tmp_path / "data" / "clips" / "a.mp4", tmp_path / "data" / "b.mp4")
    output = tmp_path / "run" / "k.jsonl"
    report = keep_all(rows, output)
    assert report.media_root == tmp_path / "data"
    assert f"need --media-root {tmp_path / 'data'}" in report.describe()
    assert [row.video for row in load_rows(output, media_root=report.media_root)] == [row.video for row in rows]
    monkeypatch.chdir(tmp_path)  # the root that was given is kept, also where it is relative
    report = keep_all(rows, output, media_root=Path())
    assert report.media_root == tmp_path
    read = load_rows(output, media_root=report.media_root)
    assert [row.media for row in read] == ["data/clips/a.mp4", "data/b.mp4"]
    report = keep_all(rows, output, media_root=tmp_path / "data" / "clips")  # does not hold them all
    assert report.media_root == tmp_path / "data"


def test_links_out_of_the_folder_need_a_root(tmp_path):
    """A row of a data set may not be read through a link that leaves its folder; a root allows it."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.mp4").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "clips").symlink_to(tmp_path / "far")
    rows = media_rows(tmp_path / "run" / "clips" / "a.mp4")
    report = keep_all(rows, tmp_path / "run" / "k.jsonl")
    assert report.media_root == tmp_path / "run" / "clips"
    assert load_rows(report.output, media_root=report.media_root)[0].video == rows[0].video


def test_rows_that_fail(tmp_path):
    rows, output = text_rows(3), tmp_path / "k.jsonl"
    good = Scripted({row.id: 1 for row in rows})

    def sampler(row, seed):
        if row.id == "r1":
            raise MediaError("a.mp4 cannot be read: convert it")
        return good(row, seed)

    with pytest.raises(MediaError, match=r"d\.jsonl:1: a\.mp4 cannot be read"):
        filter_rows(None, rows, output, sampler=sampler)
    assert [name for name, _ in good.asked] == ["r0"]
    report = filter_rows(None, rows, output, sampler=sampler, skip_bad=True)
    assert (report.sometimes, report.failed, report.sampled) == (2, ("d.jsonl:1: a.mp4 cannot be read: convert it",), 1)
    report = filter_rows(None, rows, output, sampler=good)  # and now it can
    assert (report.sometimes, report.failed, report.sampled) == (3, (), 1)


def test_a_row_that_cannot_be_judged(tmp_path):
    rows = text_rows(2)
    rows[0] = replace(rows[0], answer=[1])  # no text, which no file could have brought in
    with pytest.raises(DataError, match=r"^d\.jsonl:0: answer \[1\] "):
        filter_rows(None, rows, tmp_path / "k.jsonl", sampler=Scripted({"r0": 1, "r1": 1}))
    report = filter_rows(None, rows, tmp_path / "k.jsonl", sampler=Scripted({"r0": 1, "r1": 1}), skip_bad=True)
    assert (report.sometimes, len(report.failed)) == (1, 1)


def test_stopping_and_telling(tmp_path):
    rows, output, told = text_rows(5), tmp_path / "k.jsonl", []
    sampler = Scripted({row.id: 1 for row in rows})
    with pytest.raises(Cancelled, match="stopped after 2 of 5 rows"):
        filter_rows(None, rows, output, sampler=sampler, should_stop=lambda: len(sampler.asked) == 2)
    assert not output.exists()
    filter_rows(None, rows, output, sampler=sampler, progress=lambda *what: told.append(what))
    assert len(sampler.asked) == 5
    assert told == [("filter", done, 5) for done in range(6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "samples is 1: whether a row is solved sometimes takes at least 2"),
        ({"threshold": 0}, "threshold is 0: expected a number above 0, up to 1"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"sampler": None}, "there is no model to sample from"),
        ({"sampler": lambda *_: ["x"]}, r"d\.jsonl:0: the sampler made 1 completions: expected 8"),
    ],
)
def test_values_that_cannot_be_used(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        filter_rows(None, text_rows(1), tmp_path / "k.jsonl", **{"sampler": Scripted({"r0": 1}), **options})
    with pytest.raises(ConfigError, match="is a folder: give the JSONL file to write"):
        filter_rows(None, text_rows(1), tmp_path, sampler=Scripted({"r0": 1}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": SamplingConfig(temperature=0.0)}, r"temperature is 0\.0: samples differ only above 0"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0"),
        ({"threshold": float("nan")}, "threshold is nan"),
    ],
)
def test_filter_settings_that_cannot_be_used(options, message):
    with pytest.raises(ConfigError, match=message):
        FilterConfig(**options)


def test_rows_that_cannot_be_told_apart(tmp_path):
    with pytest.raises(DataError, match=r"d\.jsonl:0: the id 'r0' is that of d\.jsonl:0 already"):
        filter_rows(None, text_rows(1) * 2, tmp_path / "k.jsonl", sampler=Scripted({}))


def test_the_data_are_not_written_over(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"id": "a", "question": "2 + 2?", "answer": "4"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl is the file that the rows come from"):
        filter_rows(None, load_rows(path), path, sampler=Scripted({"a": 1}))


def test_progress_that_is_damaged(tmp_path):
    output = tmp_path / "k.jsonl"
    filter_rows(None, text_rows(1), output, sampler=Scripted({"r0": 1}))
    with progress_file(output).open("a") as file:
        file.write('{"id": "r1", "second": [1]}\n')
    with pytest.raises(DataError, match=r"k\.progress\.jsonl:3: no progress of a row; remove the line"):
        filter_rows(None, text_rows(2), output, sampler=Scripted({"r1": 1}))


def test_nothing_left(tmp_path):
    output = tmp_path / "k.jsonl"
    with pytest.raises(DataError, match=r"no row is left of 2: .*1 dropped as never right and 1 as right 8 times"):
        filter_rows(None, text_rows(2), output, sampler=Scripted({"r0": 0, "r1": 8}))
    assert not output.exists()
    assert progress_file(output).exists()


@pytest.mark.parametrize("more", [["--filter-only"], [], ["--reward", "agreement"]])
def test_formulas_without_their_package_end_before_the_work_begins(tmp_path, monkeypatch, capsys, more):
    rows = [
        {"id": "a", "question": "2 + 2?", "answer": "4"},
        {"id": "b", "question": "x?", "answer": "4", "kind": "math"},
    ]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr(math_equality, "is_available", lambda: False)
    options = ["--data", str(data), "--output", str(tmp_path / "o"), *more]
    assert main(options) == 2
    told = f"error: {data}:2: questions of kind math need the package math-verify: pip install 'mlxvr[math]'\n"
    assert capsys.readouterr().err == told
    assert not (tmp_path / "o").exists()


def test_formulas_of_which_nobody_asks_need_no_package(tmp_path, monkeypatch):
    data = tmp_path / "d.jsonl"
    data.write_text(
        '{"id": "a", "question": "2?", "answer": "4"}\n{"id": "b", "question": "x?", "answer": "4", "kind": "math"}\n'
    )
    monkeypatch.setattr(math_equality, "is_available", lambda: False)
    for settings in ({"limit": 1}, {"reward": ("ours:length",)}):
        assert read_training_rows(TrainConfig(data=data, output=tmp_path / "o", **settings))[0][0].id == "a"


def test_a_reward_function_of_the_users_own(tmp_path):
    """Its number, or the `second` of its Reward, is held against the threshold; it judges rows without answer, too."""
    rows = [replace(row, answer=None) if row.id == "r1" else row for row in text_rows(3)]
    table = {"r0": [1.0, 3.0], "r1": [2.0, 2.5], "r2": [0.0, 1.9]}
    texts = {name: [f"{name} {place}" for place in range(2)] for name in table}

    def own(text, row):
        total = table[row.id][int(text.split()[1])]
        return total if row.id != "r2" else Reward(total=9.0, first=9.0, second=total, format=1.0, fallback=0.0)

    def call(name, **options):
        output = tmp_path / name
        return filter_rows(None, rows, output, samples=2, sampler=lambda row, _: texts[row.id], **options)

    report = call("own.jsonl", reward=own, threshold=2.0)
    assert (report.sometimes, report.never, report.always, report.unlabelled) == (1, 1, 1, 0)
    assert [row.id for row in load_rows(tmp_path / "own.jsonl", labelled=False)] == ["r0"]
    assert call("low.jsonl", reward=own, threshold=0.5).sometimes == 1  # r2 alone is sometimes below
    with pytest.raises(ConfigError, match=r"threshold is 2\.0"):
        call("paper.jsonl", threshold=2.0)
    with pytest.raises(ConfigError, match=r"d\.jsonl:0: the reward function failed \(KeyError: 'r0'\)"):
        call("fails.jsonl", reward=lambda text, row: {}[row.id], threshold=2.0)


def test_progress_names_the_adapter_and_the_reward(tmp_path):
    """What the base model made of rows says nothing of an adapter."""
    rows, output = text_rows(1), tmp_path / "k.jsonl"
    filter_rows(None, rows, output, sampler=Scripted({"r0": 1}), judged_by={"adapter": "aa"})
    assert json.loads(progress_file(output).read_text().splitlines()[0])["run"]["adapter"] == "aa"
    for changed in ({"adapter": "bb"}, {}, {"adapter": "aa", "reward": "m:f"}):
        with pytest.raises(ConfigError, match=r"other settings|made with"):
            filter_rows(None, rows, output, sampler=Scripted({"r0": 1}), judged_by=changed)


def test_filter_only_samples_with_the_adapter_that_training_begins_from(tmp_path, monkeypatch):
    """Held against the trained model's own rollout; the base model's differs."""
    model = tiny_model(tmp_path / "model", "qwen3_vl")
    attach(model, LoraConfig(rank=2), seed=0)
    stir(model, amount=1.0)
    save_adapter(tmp_path / "adapter", model, LoraConfig(rank=2))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "question": "Is it?", "answer": "B"}) + "\n")
    (row,) = load_rows(tmp_path / "rows.jsonl")
    seed = int.from_bytes(hashlib.sha256(b"4/a").digest()[:4])
    expected = rollout(
        model, encode_row(model, row), SamplingConfig(max_tokens=6, temperature=0.7, seed=seed), group_size=3
    ).texts
    texts = []
    monkeypatch.setitem(
        sys.modules, "own_filter_reward", SimpleNamespace(see=lambda text, row: texts.append(text) or 0.0)
    )
    options = {
        "model": tmp_path / "model",
        "data": tmp_path / "rows.jsonl",
        "filter_only": True,
        "filter_samples": 3,
        "max_completion_tokens": 6,
        "temperature": 0.7,
        "seed": 4,
        "reward": ("own_filter_reward:see",),
    }
    runs = {}
    for name, adapter in (("with", tmp_path / "adapter"), ("without", None)):
        texts.clear()
        with pytest.raises(DataError, match="no row is left of 1"):
            train(TrainConfig(**options, output=tmp_path / name, adapter=adapter))
        runs[name] = list(texts)
    assert runs["with"] == expected
    assert runs["without"] != expected
    told = json.loads((tmp_path / "with" / "kept.progress.jsonl").read_text().splitlines()[0])["run"]
    assert told["reward"] == "own_filter_reward:see"
    assert len(told["adapter"]) == 16
