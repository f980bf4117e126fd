"""The report: its figures against the summary's, charts against coordinates worked by hand, its page in a browser."""

import base64
import hashlib
import html
import html.parser
import io
import json
import random
import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from browser import NEEDS_BROWSER, Browser
from clips import write_clip
from PIL import Image

from mlxvr.errors import ConfigError, DataError, MediaError
from mlxvr.evaluation.analysis.bootstrap import Estimate
from mlxvr.evaluation.analysis.calibration import Calibration, TaskThreshold, TemperatureFit, ThresholdOutcome
from mlxvr.evaluation.analysis.compare import compare
from mlxvr.evaluation.analysis.metrics import summarise
from mlxvr.evaluation.analysis.sweep import sweep
from mlxvr.evaluation.analysis.threshold_search import CalibrationPlan, calibrate
from mlxvr.evaluation.graded_rows import curve, grade_rows
from mlxvr.evaluation.report.gallery import read_thumbnails
from mlxvr.evaluation.report.report_files import ReportedRun, ReportOptions, write_report
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
    def write(samples, threshold=0.9, *, title="A run", settings=None, other=None, other_threshold=None,
              calibration=None, progress=None, **options):  # fmt: skip
        run = ReportedRun(title=title, samples=samples, threshold=threshold, settings=settings or {})
        before = None
        if other is not None:
            before = ReportedRun(title=other[0], samples=other[1], threshold=other_threshold or threshold)
        options = ReportOptions(**{"bootstrap": 50, "plots": False, "media_root": tmp_path, **options})
        return write_report(
            tmp_path / "out", run, before=before, calibration=calibration, options=options, progress=progress
        )

    return write


def data_of(path):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(found[1])


def plain_text(path):
    """The words of a page's body, without markup."""
    body = re.sub(r"(?s)<(script|style).*?</\1>|<tr>.*?</tr>", "", path.read_text().partition("<body>")[2])
    return re.sub(r"\s+", " ", html.unescape(re.sub("<[^>]*>", "", body.replace("</p>", " </p>"))))


def test_figures_are_the_summarys(write):
    path = write(HAND, settings={"model": "m", "nested": {"x": 1}})
    data, figures = data_of(path), json.loads((path.parent / "report.json").read_text())
    expected = json.loads(json.dumps(summarise(HAND, threshold=0.9, bootstrap=50).to_dict()))
    assert data["summary"] == figures["summary"] == expected
    # 1, 2 exit right, 4 wrong, 9 with IoU 0.5; 3, 5, 7 reason and are right, 6 is wrong, 10 too but for IoU 0.5
    assert expected["overall"]["auto"]["score"]["value"] == pytest.approx((1 + 1 + 0 + 0.5 + 1 + 1 + 1 + 0 + 0.25) / 9)
    assert figures["settings"] == {"model": "m", "nested": {"x": 1}}
    assert figures["curve"] == data["curve"]
    assert sorted(item.name for item in path.parent.iterdir()) == ["report.html", "report.json"]


# rows 0 to 7 exit with a right answer, 8 with a wrong one, 9 reasons and is put right; 7 and 8 are a pair
TEN = [
    row(str(n), "A" if n < 8 else "B", "A", 0.99 if n < 9 else 0.1, task="one" if n < 5 else "two",
        pair="p" if n in (7, 8) else "")
    for n in range(10)
]  # fmt: skip


def test_tables_by_hand(write):
    """Nine clips, since a pair is drawn together: where all agree, Wilson's interval begins at 9 / (9 + 1.96^2)."""
    cells = {cells[0]: cells[1:] for cells in Reader(write(TEN).read_text()).rows}
    direct, think, auto = (
        cells[f"{name} {note}"]
        for name, note in (("direct", "first answer"), ("think", "always reasons"), ("auto", "early exit"))
    )
    assert [mode[0].split()[0] for mode in (direct, think, auto)] == ["80%", "100%", "90%"]
    assert think[0] == "100% 70 to 100"
    assert [mode[1].split()[0] for mode in (direct, think, auto)] == ["0%", "100%", "0%"]
    assert direct[2:] == ["5.0 5.0 · 5.0 · 5.0", "0.50 s 0.50 · 0.50 · 0.50"]
    assert think[2:] == ["105 105 · 105 · 105", "4.5 s 4.5 · 4.5 · 4.5"]
    # mean (9 * 5 + 105) / 10, 90th percentile 5 + 0.1 * 100, 95th 5 + 0.55 * 100
    assert auto[2] == "15.0 5.0 · 15.0 · 60"
    assert auto[3] == "0.90 s 0.50 · 0.90 · 2.7"  # likewise (9 * 0.5 + 4.5) / 10, 0.5 + 0.1 * 4, 0.5 + 0.55 * 4
    assert cells["Task"][2:] == [
        "Direct",
        "Think",
        "Auto",
        "Gain of thinking",
        "Auto − think",
        "Think ratio",
        "Tokens",
        "of think’s",
    ]
    # one: five rows that are right and exit; two: of five, 8 and 9 are wrong at first, only 9 reasons
    assert [cell.split()[0] for cell in cells["one"]] == ["5", "5", "100%", "100%", "100%", "0", "0", "0%", "5.0", "5%"]
    assert [cell.split()[0] for cell in cells["two"]] == (
        ["5", "4", "60%", "100%", "80%", "+40", "−20", "20%", "25", "24%"]
    )


def agreeing(count, **others):
    return [row(f"{index:02}", **others) for index in range(count)]


@pytest.mark.parametrize(
    ("samples", "threshold", "words", "absent"),
    [
        (agreeing(49), 0.9, "Only 49 independent clips: ", "independent clip only"),
        (agreeing(50), 0.9, "No row reasons at this threshold: ", "independent clip"),
        (agreeing(3, media="a.mp4"), 0.9, "One independent clip only: ", "Only 1 "),
        (agreeing(9), 0.995, "Every row reasons at this threshold: ", "No row reasons"),
        (TEN, 0.9, "1 answer given early is wrong. Show", "reasons at this threshold"),
        (HAND, 0.9, "Rows without a direct answer always reason.", "The 30 that think most"),
        (TEN, 0.9, "Accuracy against cost at every threshold", "always reason."),
        ([replace(sample, answer=None) for sample in TEN], 0.9, "no labels", "differences in points"),
        ([replace(sample, task=f"t{sample.id}") for sample in agreeing(31)], 0.9, "The 30 that think most; ", "nan"),
        ([row("0", "A", "B"), row("1", "B", "A")], 0.9, "costs no accuracy (difference −100 to +100)", "in every row"),
    ],
)
def test_what_a_page_says_and_when(write, samples, threshold, words, absent):
    text = plain_text(write(samples, threshold))
    assert words in text
    assert absent not in text


def test_the_title_is_not_repeated(write):
    text = write(TEN, title="m on d", settings={"model": "m", "data": "d", "task": "t"}).read_text()
    assert '<p class="subtitle">t</p>' in text


def test_many_failed_rows_are_folded(write):
    for count, opening in ((10, "<details open><summary>10 rows"), (11, "<details><summary>11 rows")):
        assert opening in write([row("ok"), *(row(f"{n}", error="gone") for n in range(count))]).read_text()


def test_the_slider_begins_at_the_threshold(write):
    """The curve has 0, 0.545, 0.9 and 0.995."""
    assert 'min="0" max="3" step="1" value="2"' in write(TEN).read_text()


def test_bars_begin_with_what_thinks_most(write):
    samples = [
        row("1", task="a"),
        row("2", "A", "A", 0.1, task="z"),
        *(row(f"n{n}", task=f"t{n:02}") for n in range(30)),
    ]
    chart = write(samples).read_text().rpartition('<svg class="chart"')[2].partition("</svg>")[0]
    titles = re.findall("<title>(.*?)</title>", chart)
    assert titles[:2] == ["rows that reason", "z: 100% of 1 row"]
    assert len(titles) == 31


def test_a_comparison_in_words(write):
    run, wrong = agreeing(99), row("00", "B", "B")
    assert plain_text(write(run, other=("before", [wrong, *run[1:]]))).count("Auto scores +1 point (") == 1
    assert "Auto scores 0 points against before: the same score in both." in plain_text(
        write(run, other=("before", run))
    )
    all_wrong = [replace(sample, first="B", text="B", second="B") for sample in run]
    assert "Auto scores +100 points against before: no difference can be shown" in (
        plain_text(write(run, other=("before", all_wrong)))
    )


def test_a_comparison_of_two_thresholds(write):
    """At 0.05 the run before reasons on no row: 5 tokens; this one on one of ten: 15."""
    path = write(TEN, other=("before", TEN), other_threshold=0.05)
    assert "Thresholds: 0.05 and 0.9." in plain_text(path)
    cells = {cells[0]: cells[1:] for cells in Reader(path.read_text()).rows}
    assert (cells["think ratio"][:2], cells["tokens a question"][:2]) == (["0%", "10%"], ["5.0", "15.0"])
    figures = json.loads((path.parent / "report.json").read_text())
    assert (figures["comparison"]["thresholds"], figures["other_summary"]["threshold"]) == ([0.05, 0.9], 0.05)


def test_a_cost_is_neither_better_nor_worse(write):
    """Each row took 105 tokens before and takes 5 now: the interval has no width, and nothing is coloured."""
    path = write(agreeing(40), other=("before", agreeing(40, confidence=0.1)))
    cells = {cells[0]: cells[1:] for cells in Reader(path.read_text()).rows}
    assert cells["tokens a question"] == ["105", "5.0", "−100"]
    run = [row(f"{n:02}", confidence=0.99 if n < 30 else 0.1) for n in range(40)]
    text = write(run, other=("before", agreeing(40, confidence=0.1))).read_text()
    assert not re.search('<span class="(better|worse)">', text)


def test_columns_say_how_many_rows_they_are_over(write):
    samples = [*HAND, row("x", pair="alone"), row("y", pair="q"), row("z", pair="q", answer=None)]
    head = next(cells for cells in Reader(write(samples).read_text()).rows if cells[0] == "Mode")
    # 8 choices and the answer of the grounded question; two with an interval; pairs need all rows and a second one
    assert head[1:4] == ["Score", "Accuracy (n 10)", "mIoU (n 2)"]
    assert head[4:] == ["R@0.3", "R@0.5", "R@0.7", "Acc@GQA", "Pairs (n 1)", "Tokens", "Seconds"]


def test_first_sentence(write):
    text = write([replace(sample, pair="") for sample in TEN])
    said = re.sub("<[^>]*>", "", re.search('<p class="lead">(.*?)</p>', text.read_text())[1])
    # 0-7 exit right, 8 exits wrong, 9 reasons and is put right: 9 of 10; (9 * 5 + 105) / 10 tokens against 105
    assert said.startswith("At threshold 0.9 the model scores 90% accuracy (95% interval ")
    assert "over 10 questions on 10 clips, reasoning on 10% of them, with 15.0 generated tokens" in said
    assert "against 105 for always thinking: the early exit saves 86% of the tokens and costs 10 points of acc" in said


def test_curve_by_hand():
    rows = curve(grade_rows(TEN, 0.9), 0.9)
    assert [(row.threshold, row.score, row.mean_tokens, row.think_ratio) for row in rows] == [
        (0, 0.8, 5, 0),
        (pytest.approx(0.545), 0.9, 15, 0.1),  # between the two confidences
        (0.9, 0.9, 15, 0.1),
        (pytest.approx(0.995), 1, 105, 1),
    ]


def test_curve_equals_sweep():
    samples = [*random_samples(80, 1), *HAND[2:]]
    samples = [replace(sample, id=f"{index}") for index, sample in enumerate(samples)]
    rows = curve(grade_rows(samples, 0.97), 0.97)
    expected = sweep(samples, [one.threshold for one in rows])
    for found, wanted in zip(rows, expected, strict=True):
        assert vars(found) == pytest.approx(vars(wanted), abs=1e-9)
    assert rows[0].threshold == 0
    assert rows[-1].think_ratio == 1
    assert 0.97 in [one.threshold for one in rows]
    ratios = [one.think_ratio for one in rows]
    assert len(set(ratios)) == 2 + len({s.confidence for s in samples if not s.error and s.confidence is not None}) - 1
    assert len(curve(grade_rows(samples, 0.97), 0.97, most=5)) <= 8


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
    path = write(samples, clips=0)
    assert data_of(path)["clips"] == []
    assert "too large" not in path.read_text()


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
    found = calibrate(samples, CalibrationPlan("ratio", budget=1.0, folds=2))
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
    assert "flipped: 0 began to think, 0 stopped. 0 first answers changed." in re.sub(r"\s+", " ", text)
    assert "1 first answer changed</a>" in write([row("1")], other=("before", [row("1", "B")])).read_text()


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
    assert "the result of always thinking is not known" in text
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
    assert cells[1:3] == ["72", "61"]  # (3 * 5 + 6 * 105) / 9 = 71.7 and (4 * 5 + 5 * 105) / 9 = 60.6


def test_comparison_of_other_rows_is_refused(write):
    with pytest.raises(DataError, match="no row in common"):
        write(HAND, other=("other", [row("elsewhere")]))


def outcome(**scores):
    """Of 200 rows 60% reason, at 50 tokens on average against 105."""
    estimates = {name: Estimate(value=value, low=low, high=high) for name, (value, low, high) in scores.items()}
    ratio, tokens = Estimate(value=0.6, low=0.53, high=0.67), Estimate(value=50.4, low=45, high=56)
    return ThresholdOutcome(
        count=200, clips=200, think_ratio=ratio, tokens=tokens, always_tokens=105.2,
        **{"auto": None, "think": None, "direct": None, "difference": None, **estimates},
    )  # fmt: skip


CHOSEN = Calibration(
    threshold=0.97,
    goal="no_loss",
    margin=0.01,
    budget=None,
    fold_thresholds=(0.98, 0.96, 0.97),
    held_out=outcome(auto=(0.8, 0.74, 0.86), think=(0.9, 0.86, 0.94), difference=(-0.1, -0.15, -0.05)),
    in_sample=outcome(auto=(0.9, 0.86, 0.94), think=(0.9, 0.86, 0.94), difference=(0.0, 0.0, 0.0)),
    per_task={"own": TaskThreshold(threshold=0.5, count=150, held_out=outcome(difference=(0.1, 0.05, 0.15))),
              "few": TaskThreshold(threshold=0.97, count=3, held_out=None),
              "rare": TaskThreshold(threshold=0.97, count=1, held_out=None)},
    temperature=TemperatureFit(temperature=1.234, count=1500, ece=0.1, ece_scaled=0.0321, brier=0.25,
                               brier_scaled=0.2),
    folds=3,
    bootstrap=50,
    seed=0,
)  # fmt: skip


def test_calibration_is_shown(write):
    path = write(TEN, 0.97, calibration=CHOSEN)
    assert data_of(path)["calibration"] == json.loads(json.dumps(CHOSEN.to_dict()))
    words = plain_text(path)
    assert "Goal: no loss of score against always thinking, within 1 point. All rows choose 0.97; " in words
    assert "the 3 folds chose from 0.96 to 0.98." in words
    assert "other figures of this page" not in words
    cells = {cells[0]: cells[1:] for cells in Reader(path.read_text()).rows}
    assert cells["held-out folds"] == (
        ["80% 74 to 86", "90% 86 to 94", "–", "−10 −15 to −5", "60% 53 to 67", "50", "105"]
    )
    assert cells["the rows that chose it"][3] == "0"
    assert cells["own"] == ["0.5", "150", "+10 +5 to +15", "60% 53 to 67", "50"]
    assert "2 tasks with too few rows take the common threshold." in words
    assert "T = 1.23, over 1,500 answers, held out." in words
    assert (cells["raw"], cells["scaled"]) == (["0.100", "0.250"], ["0.032", "0.200"])
    coloured = [attributes["class"] for _, attributes in Reader(path.read_text()).tags
                if attributes.get("class") in ("better", "worse")]  # fmt: skip
    assert sorted(coloured) == ["better", "worse"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"margin": 0.005}, "Goal: no loss of score against always thinking, within 0.5 points. All"),
        ({"goal": "ratio", "budget": 0.6}, "Goal: at most 60% of the rows reason. All"),
        ({"goal": "tokens", "budget": 80.0}, "Goal: at most 80 mean tokens. All"),
        ({"goal": "accuracy"}, "Goal: the best score. All"),
        ({"fold_thresholds": (0.97, 0.97)}, "the 3 folds chose 0.97. "),
        (
            {"threshold": 1.0000001},
            "All rows choose above 1; the 3 folds chose from 0.96 to 0.98. No direct",
        ),
        ({"threshold": 0.5}, "The other figures of this page are those of threshold 0.97."),
    ],
)
def test_what_a_calibration_says(write, changes, words):
    assert words in plain_text(write(TEN, 0.97, calibration=replace(CHOSEN, **changes)))


def test_a_calibration_that_was_searched_is_shown(write):
    samples = random_samples(200, 5)
    found = calibrate(samples, CalibrationPlan("ratio", budget=0.6, temperature=True, per_task=True, least_per_task=50))
    path = write(samples, found.threshold, calibration=found)
    assert data_of(path)["calibration"] == json.loads(json.dumps(found.to_dict()))
    cells = next(cells for cells in Reader(path.read_text()).rows if cells[0] == "held-out folds")
    assert cells[5].split()[0] == f"{100 * found.held_out.think_ratio.value:.0f}%"


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
    run, options = ReportedRun(samples=HAND, threshold=0.9, title="x"), ReportOptions(plots=False, bootstrap=0)
    with pytest.raises(ConfigError, match="choose another output folder"):
        write_report(tmp_path / "file", run, options=options)


def test_plots(write):
    pytest.importorskip("matplotlib")
    path = write(HAND, plots=True, title="cost $x$", other=("bf16", HAND))
    charts = ("cost", "thresholds", "confidence", "reliability", "think_ratio")
    folder = path.parent / "plots"
    assert {item.name for item in folder.iterdir()} == {f"{name}.{kind}" for name in charts for kind in ("png", "svg")}
    words = {name: re.findall(r"<text[^>]*>([^<]*)<", (folder / f"{name}.svg").read_text()) for name in charts}
    assert {"cost $x$, threshold 0.9", "cost $x$", "bf16", "auto", "Score"} <= set(words["cost"])
    assert {"right (5)", "wrong (2)", "threshold 0.9"} <= set(words["confidence"])  # wrong: 3 and 4; 5 and 6 have none
    assert {"count (3)", "&lt;odd&gt; task (1)", "rows that reason"} <= set(words["think_ratio"])
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    write(HAND, plots=True, title="cost $x$", other=("bf16", HAND))
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == before


def test_plots_show_what_the_page_shows(write):
    """The dot of auto: at the same place of the drawing in the page and in the file, six inches or 900 dots wide."""
    pytest.importorskip("matplotlib")
    path = write(TEN, plots=True)
    dot = re.search(r'class="dot run0 auto" cx="([\d.]+)" cy="([\d.]+)"', path.read_text())
    with Image.open(path.parent / "plots" / "cost.png") as picture:
        scale, below = picture.width / 460, 300  # the height of the drawing, under its heading
        x, y = float(dot[1]) * scale, picture.height - (below - float(dot[2])) * scale
        assert picture.size == (900, round((300 + 18) * scale))
        assert picture.convert("RGB").getpixel((round(x), round(y))) == (0xC4, 0x36, 0x1F)


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


SHOW = """
(async () => {
  const shown = {};
  for (const [name, value] of WANTED) {
    for (const field of document.querySelectorAll("#filters select, #filters input")) {
      if (field.id !== "filter-sort") field.value = "";
    }
    document.getElementById(`filter-${name}`).value = value;
    document.getElementById("filters").dispatchEvent(new Event("input"));
    await new Promise((done) => setTimeout(done, 200));
    const texts = (meta) => [...meta.children].map((part) => part.textContent);
    shown[`${name} ${value}`] = [...document.querySelectorAll("article.card .meta")].map(texts);
  }
  return shown;
})()
"""


@NEEDS_BROWSER
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
    ids = {sample.id for sample in HAND}
    with Browser(tmp_path) as browser:
        browser.open(path)
        shown = browser.evaluate(SHOW.replace("WANTED", json.dumps([name.split(" ", 1) for name in names])))
    assert {
        name: " ".join(sorted((part for card in cards for part in card if part in ids), key=int))
        for name, cards in shown.items()
    } == names


@NEEDS_BROWSER
def test_in_a_browser(write, tmp_path):
    """The gallery, the slider by its keys, links by theirs, dark colours, paper; the console has no complaints."""
    write_clip(tmp_path / "a.mp4", frames=12)
    path = write([*HAND, *(row(f"m{n}", question=NASTY) for n in range(60))], other=("before", HAND))
    background = "getComputedStyle(document.body).backgroundColor"
    menu = "getComputedStyle(document.querySelector('nav')).display"
    with Browser(tmp_path) as browser:
        browser.open(path)
        assert browser.evaluate("document.querySelectorAll('article.card').length") == 24
        assert browser.evaluate("document.getElementById('found').textContent") == "70 of 70 rows"
        browser.evaluate("document.querySelector('.frames').scrollIntoView()")
        browser.wait("document.querySelector('.frames img').naturalWidth > 0")
        tried = "document.getElementById('tried').textContent"
        assert browser.evaluate(tried).startswith("threshold 0.9 · ")
        probe = "Number(document.getElementById('probe').getAttribute('cx'))"
        assert browser.evaluate(probe) > 48
        browser.evaluate("document.getElementById('threshold').focus()")
        browser.press("End", 35)
        # at the end of the curve every row reasons: 100% and 105 tokens
        assert browser.evaluate(tried).endswith(" · 100% of rows reason · 105 tokens a question")
        browser.evaluate("document.querySelector('.cautions a').focus()")
        browser.press("Enter", 13)
        assert browser.evaluate("document.getElementById('found').textContent") == "1 of 70 rows"
        assert (browser.evaluate(background), browser.evaluate(menu)) == ("rgb(251, 251, 250)", "flex")
        browser.open(path, 400, is_dark=True)
        assert browser.evaluate(background) == "rgb(20, 22, 26)"
        root = "document.documentElement"
        assert browser.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"), "a narrow page scrolls sideways"
        browser.open(path, medium="print")
        assert browser.evaluate(menu) == "none"
        assert browser.complaints == []


@NEEDS_BROWSER
def test_the_policy_holds_in_a_browser(write, tmp_path):
    """What would slip into the page neither runs nor loads."""
    intruder = (
        "(() => { const script = document.createElement('script'); script.textContent = 'window.ran = true';"
        "const picture = new Image(); picture.src = 'http://127.0.0.1:9/x.png';"
        "document.body.append(script, picture); return window.ran === undefined; })()"
    )
    with Browser(tmp_path) as browser:
        browser.open(write(HAND[:3]))
        assert browser.evaluate(intruder)
        browser.evaluate("new Promise((done) => setTimeout(done, 300))")
        refused = [complaint for complaint in browser.complaints if "Content Security Policy" in complaint]
    assert len(refused) == len(browser.complaints) == 2
