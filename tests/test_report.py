"""The report: its figures against the summary's, charts against coordinates worked by hand, its page in a browser."""

import base64
import hashlib
import html.parser
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from clips import write_clip
from PIL import Image

from mlxvr.errors import ConfigError, DataError, MediaError
from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.bootstrap import Estimate
from mlxvr.evaluation.analysis.compare import compare
from mlxvr.evaluation.analysis.metrics import summarise
from mlxvr.evaluation.analysis.reliability import reliability
from mlxvr.evaluation.analysis.sweep import SweepRow, sweep
from mlxvr.evaluation.analysis.threshold_search import calibrate
from mlxvr.evaluation.graded_rows import curve, judge
from mlxvr.evaluation.report import charts
from mlxvr.evaluation.report.gallery import read_thumbnails
from mlxvr.evaluation.report.report_files import write_report
from mlxvr.evaluation.samples import Sample

FALLBACK = "Let's analyze the problem step by step."
VOID = {"meta", "input", "img", "br", "hr", "link"}
NASTY = "</script><script>alert(1)</script><!-- <b onclick='x'>\u2028 & \"q\" ' {x}"


def row(name, first="A", second="A", confidence=0.99, *, answer="A", **others):
    defaults = {"kind": "exact_match", "options": ("x", "y"), "media": "", "text": second or first or ""}
    costs = {"first_tokens": 5, "total_tokens": 105, "first_seconds": 0.5, "total_seconds": 4.5}
    fields = {**defaults, **costs, **others}
    return Sample(id=name, first=first, second=second, confidence=confidence, answer=answer, **fields)


HAND = [
    row("1", "A", "A", 0.99, reasoning="because", media="a.mp4"),
    row("2", "A", "B", 0.95, task="count", category="hard"),
    row("3", "B", "A", 0.80, task="count", pair="p"),
    row("4", "B", "A", 0.92, task="count", pair="p", category="easy"),
    row("5", FALLBACK, "A", None, task="<odd> task"),
    row("6", None, None, None, text="B", problems=("no_box", "token_limit")),
    row("7", "A", "A", 0.60),
    row("8", error="no such file: <i>x</i>", task="count"),
    row("9", "[1.0, 3.0]", "[2, 4]", 0.97, answer=[[1.0, 2.0]], kind="iou", options=()),
    row("10", "A <> [1, 2]", "B <> [1, 3]", 0.4, answer=["A", [[1.0, 2.0]]], kind="gqa"),
]


def random_samples(count, seed=0, **others):
    dice = random.Random(seed)
    made = []
    for index in range(count):
        sure = dice.choice([None, 1.0, 1 - 10 ** -dice.uniform(0, 5)])
        first = None if sure is None else dice.choice("AB")
        costs = {"first_tokens": dice.randint(3, 9), "total_tokens": dice.randint(20, 300)}
        task = dice.choice(["one", "two"])
        made.append(row(str(index), first, dice.choice("AB"), sure, task=task, **{**costs, **others}))
    return made


class Reader(html.parser.HTMLParser):
    """Checks that tags close in order, and keeps texts, attributes, headings and tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.blocks = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, content):
        self.blocks[self.open[-1] if self.open else ""] = content
        if "tr" in self.open and self.rows and self.rows[-1]:
            self.rows[-1][-1] += content


@pytest.fixture
def write(tmp_path):
    def write(samples, threshold=0.9, **others):
        others = {"title": "A run", "bootstrap": 50, "plots": False, "media_root": tmp_path, **others}
        return write_report(tmp_path / "out", samples=samples, threshold=threshold, **others)

    return write


def data_of(path):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(found[1])


def test_figures_are_the_summarys(write):
    path = write(HAND, settings={"model": "m", "nested": {"x": 1}})
    data, figures = data_of(path), json.loads((path.parent / "report.json").read_text())
    expected = json.loads(json.dumps(summarise(HAND, threshold=0.9, bootstrap=50).to_dict()))
    assert data["summary"] == figures["summary"] == expected
    assert figures["settings"] == {"model": "m", "nested": {"x": 1}}
    assert figures["curve"] == data["curve"]
    assert sorted(item.name for item in path.parent.iterdir()) == ["report.html", "report.json"]


def test_tables_show_the_summary(write):
    samples = [*random_samples(60), row("x", pair="p"), row("y", pair="p")]
    summary, reader = summarise(samples, threshold=0.9, bootstrap=50), Reader(write(samples).read_text())
    modes = {cells[0].split()[0]: cells for cells in reader.rows if cells[0].split()[:1] != []}
    for name in ("direct", "think", "auto"):
        figures = getattr(summary.overall, name)
        accuracy = f"{100 * figures.accuracy.value:.0f}%"
        assert modes[name][1].split() == [
            accuracy,
            f"{100 * figures.accuracy.low:.0f}",
            "to",
            f"{100 * figures.accuracy.high:.0f}",
        ]
        assert modes[name][2].split()[0] == ("100%" if figures.pair_accuracy.value == 1 else "0%")
        assert modes[name][3].split()[0] == formatting.tokens(figures.tokens.mean)
    for name, group in summary.per_task.items():
        cells = next(cells for cells in reader.rows if cells[0] == name)
        assert cells[1] == str(group.count)
        for cell, figures in zip(cells[3:6], (group.direct, group.think, group.auto)):
            assert cell.split()[0] == f"{100 * figures.accuracy.value:.0f}%"
        assert cells[6].split()[0] == formatting.points(group.gain, group.count)
        assert cells[8].split()[0] == f"{100 * group.think_ratio.value:.0f}%"


def test_columns_say_how_many_rows_they_are_over(write):
    samples = [*HAND, row("x", pair="alone"), row("y", pair="q"), row("z", pair="q", answer=None)]
    head = next(cells for cells in Reader(write(samples).read_text()).rows if cells[0] == "Mode")
    # 8 choices and the answer of the grounded question; two with an interval; pairs need all rows and a second one
    assert head[1:4] == ["Score", "Accuracy (n 10)", "mIoU (n 2)"]
    assert head[4:] == ["R@0.3", "R@0.5", "R@0.7", "Acc@GQA", "Pairs (n 1)", "Tokens", "Seconds"]


def test_first_sentence(write):
    text = write([row(str(n), "A" if n < 8 else "B", "A", 0.99 if n < 9 else 0.1) for n in range(10)])
    said = re.sub("<[^>]*>", "", re.search('<p class="lead">(.*?)</p>', text.read_text())[1])
    # 0-7 exit right, 8 exits wrong, 9 reasons and is put right: 9 of 10; (9 * 5 + 105) / 10 tokens against 105
    assert said.startswith("At threshold 0.9 the model scores 90% accuracy (95% interval ")
    assert "over 10 questions on 10 clips, reasoning on 10% of them, with 15.0 generated tokens" in said
    assert "against 105 for always thinking: the early exit saves 86% of the tokens and costs 10 points of acc" in said


def test_curve_equals_sweep():
    samples = [*random_samples(80, 1), *HAND[2:]]
    samples = [replace(sample, id=f"{index}") for index, sample in enumerate(samples)]
    rows = curve(judge(samples, 0.97), 0.97)
    expected = sweep(samples, [one.threshold for one in rows])
    for found, wanted in zip(rows, expected, strict=True):
        assert vars(found) == pytest.approx(vars(wanted), abs=1e-9)
    assert rows[0].threshold == 0
    assert rows[-1].think_ratio == 1
    assert 0.97 in [one.threshold for one in rows]
    ratios = [one.think_ratio for one in rows]
    assert len(set(ratios)) == 2 + len({s.confidence for s in samples if not s.error and s.confidence is not None}) - 1
    assert len(curve(judge(samples, 0.97), 0.97, most=5)) <= 8


def test_page_is_well_formed_and_loads_nothing(write):
    text = write([*HAND, row("n", question=NASTY, answer="B")], settings={"model": NASTY}).read_text()
    reader = Reader(text)
    assert not re.search(r"(?:https?:|//)[a-z]", text.replace("http://www.w3.org/2000/svg", ""))
    loading = {"script", "link", "iframe", "object", "embed", "img", "base", "form"}
    assert [
        tag for tag, attributes in reader.tags if tag in loading and {"src", "href", "action"} & set(attributes)
    ] == []
    assert not [
        name for _, attributes in reader.tags for name in attributes if name.startswith("on") or name == "style"
    ]
    identities = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    anchors = {attributes["href"] for tag, attributes in reader.tags if tag == "a"}
    assert anchors <= {f"#{name}" for name in identities}


def test_policy_allows_this_style_and_script_only(write):
    text = write(HAND).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    for kind, block in (("style", r"<style>(.*?)</style>"), ("script", r"<script>(.*?)</script>")):
        content = re.search(block, text, re.DOTALL)[1]
        found = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{found}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_what_comes_from_data_is_escaped(write):
    samples = [
        replace(
            HAND[0], id=f"1{NASTY}", question=NASTY, options=(NASTY, "y"), reasoning=NASTY, media=NASTY, first=NASTY
        ),
        replace(HAND[1], task=NASTY, category=NASTY, problems=(NASTY,)),
        replace(HAND[7], error=NASTY, id=f"8{NASTY}"),
    ]
    other = (NASTY, [replace(sample, confidence=0.1) for sample in samples])
    path = write(samples, title=NASTY, settings={NASTY: NASTY}, other=other)
    text = path.read_text()
    reader = Reader(text)
    assert sum(tag == "script" for tag, _ in reader.tags) == 2
    assert not [attributes for _, attributes in reader.tags if "onclick" in attributes]
    assert "alert(1)</script>" not in text.replace("&lt;/script&gt;", "")
    assert data_of(path)["rows"][0]["question"] == NASTY


def test_gallery_records(write):
    rows = {one["id"]: one for one in data_of(write(HAND))["rows"]}
    assert set(rows) == {sample.id for sample in HAND}
    assert rows["2"]["right"] == {"direct": True, "think": False, "auto": True}
    assert (rows["2"]["reasoned"], rows["3"]["reasoned"]) == (False, True)
    assert (rows["1"]["gold"], rows["1"]["gold_option"], rows["1"]["reasoning"]) == ("A", 0, "because")
    assert rows["9"]["gold"] == "1 to 2 s"
    assert rows["9"]["spans"] == {"gold": [[1, 2]], "first": [1, 3], "final": [2, 4]}
    assert rows["9"]["score"] == {"direct": 0.5, "think": 0.0, "auto": 0.5}
    assert rows["10"]["spans"]["final"] == [1, 3]
    assert rows["10"]["gold_option"] == 0
    assert rows["8"]["error"] == "no such file: <i>x</i>"
    assert rows["6"]["first"] is None
    assert [name for name in rows if rows[name]["fallback"]] == ["5"]
    order = sorted(rows, key=lambda name: rows[name]["interest"])
    assert order[0] == "4"  # gives a wrong answer early


def test_frames_of_clips(write, tmp_path):
    write_clip(tmp_path / "a.mp4", frames=90, fps=30)
    Image.new("RGB", (900, 500), (200, 30, 30)).save(tmp_path / "b.png")
    samples = [
        row("1", media="a.mp4"),
        row("2", media="a.mp4", question="again"),
        row("3", media="a.mp4", start=1.0, end=2.0),
        row("4", media="b.png"),
        row("5", media="gone.mp4"),
        row("6"),
    ]
    told = []
    data = data_of(write(samples, progress=lambda *step: told.append(step)))
    clips = [None if one["clip"] is None else data["clips"][one["clip"]] for one in data["rows"]]
    assert len(data["clips"]) == 4
    assert told[-1] == ("frames", 4, 4)
    assert [frame["seconds"] for frame in clips[0]["frames"]] == pytest.approx([0, 0.99, 1.98, 2.97], abs=0.04)
    assert clips[1] is not None
    assert data["rows"][0]["clip"] == data["rows"][1]["clip"]
    assert [frame["seconds"] for frame in clips[2]["frames"]] == pytest.approx([1, 1.33, 1.67, 2], abs=0.04)
    assert (clips[4]["frames"], "gone.mp4 does not exist" in clips[4]["note"], clips[5]) == ([], True, None)
    picture = Image.open(io.BytesIO(base64.b64decode(clips[3]["frames"][0]["jpeg"])))
    assert (picture.format, picture.width * picture.height < 31_000) == ("JPEG", True)
    assert picture.width / picture.height == pytest.approx(1.8, abs=0.02)
    assert np.asarray(picture).mean(axis=(0, 1)) == pytest.approx([200, 30, 30], abs=4)


def test_frames_are_limited_to_what_tells_most(write, tmp_path):
    for name in "abc":
        write_clip(tmp_path / f"{name}.mp4", frames=12)
    samples = [row("1", media="a.mp4"), row("2", "B", "A", media="b.mp4"), row("3", "B", "A", 0.1, media="c.mp4")]
    samples.append(row("0", "B", "A", media="B gone.mp4"))
    path = write(samples, clips=1)
    data = data_of(path)
    assert [one["clip"] for one in data["rows"]] == [0, None, 1, None]  # 0 and 2 are wrong and exit
    assert [len(clip["frames"]) for clip in data["clips"]] == [0, 4]
    assert "Frames of 1 clip are in the page" in path.read_text()
    assert "those of 2 more would make it too large" in path.read_text()
    assert data_of(write(samples, clips=0))["clips"] == []


def test_thumbnails_of_short_clips_and_folders(tmp_path):
    assert len(read_thumbnails(write_clip(tmp_path / "one.mp4", frames=3))) in (2, 3)
    folder = tmp_path / "frames"
    folder.mkdir()
    with pytest.raises(MediaError, match="holds no jpg"):
        read_thumbnails(folder)
    for index in range(10):
        Image.new("RGB", (40, 30), (index * 20, 0, 0)).save(folder / f"{index:02}.png")
    frames = read_thumbnails(folder)
    reds = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["jpeg"]))))[..., 0].mean() for one in frames]
    assert reds == pytest.approx([0, 60, 120, 180], abs=4)
    assert frames[0]["seconds"] is None


@pytest.mark.parametrize(
    "samples",
    [
        [],
        HAND[:1],
        HAND[5:6],
        [HAND[7]],
        [replace(sample, answer=None) for sample in HAND],
        [replace(sample, task="", category="") for sample in HAND],
        [row("1", media="a.mp4"), row("2", "A", None, 0.99, reasoned=False, total_tokens=5)],
        [row("1", confidence=0.0), row("2", confidence=1.0)],
    ],
    ids=["none", "one", "no box", "failed", "unlabelled", "no groups", "live", "ends"],
)
def test_odd_runs(write, samples):
    path = write(samples)
    text = path.read_text()
    Reader(text)
    assert not re.search(r"\bnan\b|\bNone\b|Infinity", re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL))
    assert len(data_of(path)["rows"]) == len(samples)


def test_unlabelled_runs_tell_the_cost(write):
    text = write([replace(sample, answer=None) for sample in HAND[:7]]).read_text()
    said = re.sub("<[^>]*>", "", re.search('<p class="lead">(.*?)</p>', text)[1])
    assert "no labels" in said
    assert "reasons on 57%" in said  # 4 of 7
    assert "accuracy" not in said
    head = next(cells for cells in Reader(text).rows if cells[0] == "Task")
    assert head[3:] == ["Think ratio", "Tokens", "of think’s"]
    assert 'id="cost"' in text


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("A" * 40, "A" * 30 + "B" * 10, "The early exit is better than always thinking, by"),
        ("A" * 30 + "B" * 10, "A" * 40, "The early exit loses accuracy: even the best end"),
        ("A" * 39 + "B", "B" + "A" * 39, "No difference from always thinking can be shown"),
    ],
)
def test_verdicts(write, first, second, said):
    samples = [row(f"{index:02}", *pair) for index, pair in enumerate(zip(first, second))]
    assert re.search('<p class="verdict[^>]*>(.*?)</p>', write(samples).read_text())[1].startswith(said)
    always = [replace(sample, confidence=0.1) for sample in samples]  # so the comparison is that of exit and thinking
    wanted = {"is b": "this run is better", "loses": "this run is worse", "No di": "no difference can be shown"}
    text = write(samples, other=("always", always)).read_text()
    assert next(told for sign, told in wanted.items() if sign in said) in text


def test_rows_that_all_agree_are_no_certainty(write):
    """Nine of nine: the bootstrap has no spread, and yet a true share of 70% is not ruled out."""
    text = write([row(str(index), "B", "A", 0.5) for index in range(9)]).read_text()
    cells = {cells[0].split()[0]: cells for cells in Reader(text).rows}
    assert cells["think"][1] == "100% 70 to 100"
    assert cells["direct"][1] == "0% 0 to 30"
    assert "(the same in every row)" in text
    assert "(the same in every row)" not in write(random_samples(60)).read_text()


def test_one_figure_has_one_interval_wherever_it_is_shown(write, tmp_path):
    """28 rows on 14 clips, all right after thinking: Wilson's interval is that of 14, 14 / (14 + 1.96^2) = 0.785."""
    samples = [
        row(f"{index:02}", "A" if index % 4 else "B", "A", 0.99, media=f"{index // 2}.mp4", task=f"task {index % 2}")
        for index in range(28)
    ]
    found = calibrate(samples, "ratio", budget=1.0, folds=2)
    text = write(samples, 1.0, calibration=found, other=("before", samples)).read_text()
    rows = {cells[0]: cells for cells in Reader(text).rows}
    shown = [rows["think always reasons"][1], rows["the rows that chose it"][2], *rows["think"][1:3]]
    shown += [rows[f"task {index}"][4] for index in (0, 1)]
    assert shown == ["100% 78 to 100"] * 6
    assert rows["held-out folds"][2] == rows["the rows that chose it"][2]
    # the think ratio at a budget of all rows: none needs to exit, so each row reasons
    assert rows["held-out folds"][5] == rows["the rows that chose it"][5]
    figures = json.loads((tmp_path / "out" / "report.json").read_text())["summary"]["overall"]["think"]["accuracy"]
    assert figures == pytest.approx({"value": 1.0, "low": 14 / (14 + 1.959964**2), "high": 1.0})
    whiskers = re.findall(r'class="whisker run0" x1="[\d.]+" y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)"', text)
    assert all(float(low) - float(high) > 10 for low, high in whiskers), "no mode has an interval without width"
    assert len(whiskers) == 3


def test_links_lead_to_rows(write):
    """A count of none is no link: the gallery would be empty."""
    text = write([row("1"), row("2", "B")], other=("before", [row("1"), row("2", "B")])).read_text()
    shown = re.findall(r'data-show="(.*?)">(.*?)</a>', text)
    assert [label for _, label in shown if label.startswith("0 ") or label == "show"] == []
    assert "0 began to think, 0 stopped. 0 first answers read otherwise." in text
    assert "1 first answer read otherwise</a>" in write([row("1")], other=("before", [row("1", "B")])).read_text()


def test_what_was_done_is_said(write):
    text = write(HAND, settings={"model": "m", "mode": "think"}).read_text()
    assert re.search('<p class="subtitle">(.*?)</p>', text)[1].startswith("m · every row answered once with reasoning")


def test_failed_rows_are_listed(write):
    text = write(HAND).read_text()
    assert "1 row of 10 failed" in text
    assert "<code>8</code> no such file: &lt;i&gt;x&lt;/i&gt;" in text
    assert "No row failed." in write(HAND[:3]).read_text()


def test_live_runs_have_no_curve(write):
    text = write([row("1"), row("2", "B", None, 0.99, reasoned=False)]).read_text()
    assert "what thinking would have given is not known" in text
    assert 'id="cost"' not in text


def test_comparison(write):
    other = [replace(sample, confidence=0.1 if sample.id in "27" else sample.confidence) for sample in HAND]
    other[0] = replace(other[0], first="B", text="B", second="B")
    run = [*HAND, row("only here")]
    path = write(run, title="4 bit", other=("bf16", other))
    expected = compare(other, run, threshold=0.9, bootstrap=50)
    data = data_of(path)
    assert {**data["comparison"], "other": None} == json.loads(json.dumps({**expected.to_dict(), "other": None}))
    changes = {one["id"]: one["changes"] for one in data["rows"]}
    assert changes["1"] == ["became_right", "answer_changed"]
    assert changes["2"] == ["became_right", "stopped_thinking"]
    assert [name for name, told in changes.items() if told] == ["1", "2"]
    rows = {one["id"]: one for one in data["rows"]}
    assert (rows["1"]["other"]["first"], rows["1"]["other"]["right"]["auto"]) == ("B", False)
    assert rows["8"]["other"] is None
    table = {cells[0]: cells for cells in Reader(path.read_text()).rows}
    assert table["think ratio"][1:3] == ["67%", "56%"]
    cells = table["tokens a question"]
    # 9 rows; of this run 1, 2, 4 and 9 exit, of the other 1, 4 and 9
    assert cells[1:3] == [formatting.tokens((3 * 5 + 6 * 105) / 9), formatting.tokens((4 * 5 + 5 * 105) / 9)]


def test_comparison_of_other_rows_is_refused(write):
    with pytest.raises(DataError, match="no row in common"):
        write(HAND, other=("other", [row("elsewhere")]))


def test_calibration_is_shown(write):
    samples = random_samples(200, 5)
    found = calibrate(samples, "ratio", budget=0.6, temperature=True, per_task=True, least_per_task=50)
    path = write(samples, found.threshold, calibration=found)
    assert data_of(path)["calibration"] == json.loads(json.dumps(found.to_dict()))
    text = path.read_text()
    assert "at most 60% of the rows reason" in text
    assert f"All rows choose <b>{formatting.confidence(found.threshold)}</b>" in text
    cells = next(cells for cells in Reader(text).rows if cells[0] == "held-out folds")
    assert cells[5].split()[0] == f"{100 * found.held_out.think_ratio.value:.0f}%"
    assert "other figures of this page" not in text


def test_thousands_of_rows_take_seconds(write):
    samples = random_samples(4000, 2, reasoning="x" * 200)
    start = time.monotonic()
    path = write(samples, bootstrap=0)
    assert time.monotonic() - start < 15  # 1.5 s on an idle core
    assert len(data_of(path)["rows"]) == 4000
    assert len(data_of(path)["curve"]) < 260
    assert Reader(path.read_text()).tags.count(("article", {})) == 0  # cards are made by the script


def test_order_changes_nothing(write):
    first = write(HAND).read_bytes()
    assert write(HAND[::-1]).read_bytes() == first


def test_old_report_stays_when_the_new_one_cannot_be_written(write, tmp_path):
    path = write(HAND)
    old = path.read_bytes()
    with pytest.raises(DataError):
        write([*HAND, HAND[0]])
    assert path.read_bytes() == old
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose another output folder"):
        write_report(tmp_path / "file", samples=HAND, threshold=0.9, title="x", plots=False, bootstrap=0)


def test_plots(write):
    pytest.importorskip("matplotlib")
    path = write(HAND, plots=True, other=("bf16", HAND))
    names = {
        f"{name}.{kind}" for name in ("cost", "reliability", "confidence", "think_ratio") for kind in ("png", "svg")
    }
    assert {item.name for item in (path.parent / "plots").iterdir()} == names
    with Image.open(path.parent / "plots" / "cost.png") as picture:
        assert picture.size == (900, 600)
    content = (path.parent / "plots" / "cost.svg").read_bytes()
    write(HAND, plots=True, other=("bf16", HAND))
    assert (path.parent / "plots" / "cost.svg").read_bytes() == content


def test_plots_without_matplotlib(write, monkeypatch, caplog):
    monkeypatch.setattr("mlxvr.cli.plotting.find_spec", lambda name: None)
    path = write(HAND, plots=None)
    assert caplog.messages == []
    write(HAND, plots=True)
    assert caplog.messages == ["plots are left out: matplotlib is not installed (pip install 'mlxvr[plot]')"]
    assert not (path.parent / "plots").exists()


def test_page_needs_no_matplotlib():
    heavy = "'matplotlib' in sys.modules or 'mlx.core' in sys.modules"
    code = f"import sys, mlxvr.evaluation.report.report_files; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_axis_and_ticks():
    axis = charts.Axis(0, 200, 48, 446)
    assert [axis.at(value) for value in (0, 100, 200)] == [48, 247, 446]
    assert charts.Axis(1, 1, 0, 10).at(1) == 5
    assert charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert charts.ticks(0.57, 0.93) == [0.6, 0.7, 0.8, 0.9]
    assert charts.ticks(-3, 15) == [0, 5, 10, 15]
    assert charts.ticks(2, 2) == [2]


def test_nines_and_histogram():
    assert [charts.nines(value) for value in (0, 0.9, 0.99, 1, 1 - 1e-9)] == pytest.approx([0, 1, 2, 4, 4])
    assert charts.histogram([0.0, 0.5, 0.95, 0.95, 1.0], 4) == [2, 2, 0, 1]


def test_cost_chart_by_hand():
    def sweep_row(threshold, score, tokens):
        return SweepRow(
            threshold=threshold,
            score=score,
            accuracy=score,
            miou=None,
            think_ratio=0,
            mean_tokens=tokens,
            mean_seconds=0,
        )

    point = charts.Point("auto", 50, Estimate(value=0.6, low=0.5, high=0.7))
    svg = charts.cost_chart([charts.Curve("run", [sweep_row(0, 0.5, 0), sweep_row(1, 0.7, 100)], [point])], "Accuracy")
    # x: 0..104 over 48..446; y: 0.48..0.72 (0.02 beyond both) over 252..14
    line = re.search(r'points="([^"]*)"', svg)[1]
    assert line == f"48,{252 - 238 * 0.02 / 0.24:.2f} {48 + 398 * 100 / 104:.2f},{252 - 238 * 0.22 / 0.24:.2f}"
    dot = re.search(r'<circle class="dot run0 auto" cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert [float(dot[1]), float(dot[2])] == pytest.approx([48 + 398 * 50 / 104, 133], abs=0.01)
    whisker = re.search(r'class="whisker run0" x1="[\d.]+" y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)"', svg)
    assert [float(whisker[1]), float(whisker[2])] == pytest.approx([232.17, 33.83], abs=0.01)
    assert charts.cost_chart([charts.Curve("run", [sweep_row(0, None, 5)])], "Accuracy") == ""


def test_reliability_chart_by_hand():
    bins = reliability(np.array([0.15, 0.95, 0.95, 0.95]), np.array([False, True, True, False]))
    svg = charts.reliability_chart(bins)
    columns = [[float(value) for value in found] for found in re.findall(r'class="column" x="(.*?)" y="(.*?)" w', svg)]
    # bins 0.1 and 0.9 of 48..446, a unit inwards; accuracies 0 and 2/3 of 252..32
    assert columns == [
        pytest.approx([48 + 39.8 + 1, 252], abs=0.01),
        pytest.approx([48 + 398 * 0.9 + 1, 252 - 220 * 2 / 3], abs=0.01),
    ]
    assert re.findall(r'class="count"[^>]*>(\d+)<', svg) == ["1", "3"]


def test_histogram_chart_by_hand():
    svg = charts.histogram_chart([0.95, 0.95, 1.0], [0.0], 0.9)
    scale = 238 / (3 + 0.12 * 3)  # two up, one down, 6% of three beyond both
    found = re.findall(r'<rect class="(\w+)" x="(.*?)" y="(.*?)" width=".*?" height="(.*?)"', svg)
    zero = 252 - scale * (1 + 0.18)
    width = 398 / 16
    expected = [
        ("wrong", 48 + 1, zero, scale),
        ("right", 48 + 5 * width + 1, zero - 2 * scale, 2 * scale),  # 0.95 is 1.30 nines, bin 5
        ("right", 48 + 15 * width + 1, zero - scale, scale),
    ]
    for (kind, *box), (wanted, *numbers) in zip(found, expected, strict=True):
        assert kind == wanted
        assert [float(value) for value in box] == pytest.approx(numbers, abs=0.02)
    assert f'class="threshold" x1="{48 + 398 / 4:g}"' in svg


def test_think_ratio_bars():
    svg = charts.bars_chart([("a" * 30, Estimate(value=0.5, low=0.2, high=0.8), 40), ("b", Estimate(value=0), 4)], "n")
    assert re.findall(r'class="bar" x="150" y="[\d.]+" width="([\d.]+)"', svg) == ["125", "0"]
    assert ">aaaaaaaaaaaaaaaaaaa…<" in svg
    assert f"{'a' * 30}: 50% of 40 rows" in svg


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (formatting.share(Estimate(value=0.8434, low=0.82, high=0.86), 2000), "84.3%"),
        (formatting.share(Estimate(value=0.8434, low=0.76, high=0.91), 2000), "84%"),
        (formatting.share(Estimate(value=0.8434, low=0.84, high=0.85), 20), "84%"),
        (formatting.share(0.8434, 999), "84%"),
        (formatting.share(0.8434, 1000), "84.3%"),
        (formatting.share(None), "–"),
        (formatting.interval(Estimate(value=0.8, low=0.76, high=0.91), 200), "76 to 91"),
        (formatting.interval(Estimate(value=0.8, low=0.78, high=0.82), 200), "78.0 to 82.0"),
        (formatting.interval(Estimate(value=0.5, low=0.5, high=0.5), 200), ""),
        (formatting.interval(Estimate(value=1, low=None, high=None), 200), ""),
        (formatting.points(Estimate(value=-0.008, low=-0.02, high=0.01), 500), "−0.8"),
        (formatting.points(Estimate(value=-0.001, low=-0.2, high=0.1), 500), "0"),
        (formatting.points_interval(Estimate(value=0, low=-0.021, high=0.005), 500), "−2.1 to +0.5"),
        (formatting.tokens(1234.5), "1,234"),
        (formatting.tokens(6.54), "6.5"),
        (formatting.seconds(0.354), "0.35 s"),
        (formatting.seconds(4.54), "4.5 s"),
        (formatting.seconds(0), "0 s"),
        (formatting.confidence(0.97), "0.97"),
        (formatting.confidence(0.99997), "0.99997"),
        (formatting.confidence(math.nextafter(1, 2)), "above 1"),
        (formatting.confidence(1.0), "1"),
        (formatting.plain(0.8765, 1000), "0.876"),
        (formatting.plain(0.8765, 10), "0.88"),
        (formatting.count(1, "clip"), "1 clip"),
        (formatting.count(2000, "clip"), "2,000 clips"),
    ],
)
def test_numbers(found, wanted):
    assert found == wanted


def browse(page, folder, *flags):
    """The page as the browser shows it, which complains of nothing; a browser that hangs or crashes is a failure."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "<html" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


DRIVE = """
(async () => {
  const found = {}, field = (name) => document.getElementById(`filter-${name}`);
  for (const [name, value] of WANTED) {
    for (const one of document.querySelectorAll("#filters select:not(#filter-sort), #filters input")) one.value = "";
    field(name).value = value;
    document.getElementById("filters").dispatchEvent(new Event("input"));
    await new Promise((done) => setTimeout(done, 200));
    const texts = (meta) => [...meta.children].map((part) => part.textContent);
    found[`${name} ${value}`] = [...document.querySelectorAll("article.card .meta")].map(texts);
  }
  const seen = document.createElement("pre");
  seen.id = "driven";
  seen.textContent = JSON.stringify(found);
  document.body.append(seen);
})();
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
def test_filters_in_a_browser(write, tmp_path):
    """Each filter shows the rows that it names, worked out by hand from HAND at 0.9."""
    other = [replace(sample, confidence=0.1) if sample.id == "2" else sample for sample in HAND]
    path = write(HAND, other=("before", other))
    names = {  # exited early: 1, 2, 4 (right, wrong after thinking, wrong) and 9, an interval with IoU 0.5
        "decision exited": "1 2 4 9",
        "decision reasoned": "3 5 6 7 10",
        "result wrong": "4 6 10",  # of 6 and 10 the answer after thinking
        "result failed": "8",
        "thinking helped": "3 4 5",
        "thinking hurt": "2 9 10",
        "format fallback": "5",
        "format no_box": "6",
        "format problem:token_limit": "6",
        "task count": "2 3 4 8",
        "category hard": "2",
        "against stopped_thinking": "2",
        "text SUCH file": "8",
        "text because": "1",
    }
    wanted = json.dumps([name.split(" ", 1) for name in names])
    text = re.sub('<meta http-equiv="Content-Security-Policy".*?>', "", path.read_text())
    driven = path.with_name("driven.html")
    driven.write_text(text.replace("</body>", f"<script>{DRIVE.replace('WANTED', wanted)}</script></body>"))
    shown = browse(driven, tmp_path, "--virtual-time-budget=20000")
    found = json.loads(html.unescape(re.search('<pre id="driven">(.*?)</pre>', shown)[1]))
    ids = {sample.id for sample in HAND}
    assert {
        name: " ".join(sorted((part for card in cards for part in card if part in ids), key=int))
        for name, cards in found.items()
    } == names


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser chromium")
def test_in_a_browser(write, tmp_path):
    write_clip(tmp_path / "a.mp4", frames=12)
    path = write([*HAND, *(row(f"m{n}", question=NASTY) for n in range(60))], other=("before", HAND))
    shown = browse(path, tmp_path)
    assert shown.count('<article class="card">') >= 24
    assert "70 of 70 rows" in shown
    assert "data:image/jpeg" in shown
    assert re.search(r'<output id="tried"[^>]*>threshold 0.9 · ', shown)
    assert float(re.search(r'class="probe" r="6" cx="([-\d.]+)"', shown)[1]) > 48
