"""Benchmark readers, on small files in the layouts of the public releases.

The rows that are expected are written out by hand; videos are empty files where only their place matters.
"""

import csv
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clips import read_codes, write_clip
from PIL import Image

from mlxvr.data.benchmarks import BENCHMARKS, read_benchmark
from mlxvr.data.benchmarks.benchmark import COMMON_LIMITS
from mlxvr.data.benchmarks.subtitles import read_srt, read_timed_lines
from mlxvr.errors import ConfigError, DataError
from mlxvr.media.frame_options import FrameSelection
from mlxvr.media.spec import VisionSpec
from mlxvr.media.video.video_reader import read_video
from mlxvr.media.vision import load_vision, read_frames
from mlxvr.model.families.base import FAMILIES

SPEC = VisionSpec(patch_size=16, merge_size=2, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def release(tmp_path):
    return Release(tmp_path)


class Release:
    """A folder that gets files in the form that their names say."""

    def __init__(self, root):
        self.root = root

    def table(self, name, content):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(content), path)
        elif path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, content[0])
                writer.writeheader()
                writer.writerows(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_text(text, encoding="utf-8")

    def videos(self, *names):
        for name in names:
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def read(self, name, **options):
        return read_benchmark(name, self.root, **options)


def shown(row, *names):
    return tuple(getattr(row, name) for name in names)


VIDEOMME = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Law",
    "url": "https://www.youtube.com/watch?v=fFj",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many candles?",
    "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
    "answer": "C",
}
SRT = """\ufeff1
00:00:00,000 --> 00:00:02,500
<font color="white" size=".72c">Hello there,</font>

2
00:00:02,500 --> 00:00:04,000 X1:40
{\\an8}how <i>are</i>
you?

3
00:00:05,000 --> 00:00:06,000

"""


def test_videomme(release):
    release.table(
        "videomme/test-00000-of-00001.parquet",
        [
            VIDEOMME,
            {**VIDEOMME, "question_id": "001-2", "answer": "A"},
            {**VIDEOMME, "question_id": "2-1", "videoID": "b"},
        ],
    )
    release.videos("data/fFjv93ACGo8.mp4", "data/b.mkv")
    benchmark = release.read("videomme")
    first, second, third = benchmark.rows
    assert shown(first, "id", "question", "options", "answer", "kind", "task", "category") == (
        "001-1",
        "How many candles?",
        ("One.", "Two.", "Three.", "Four."),
        "C",
        "exact_match",
        "Counting Problem",
        "short",
    )
    assert shown(first, "video", "media", "start", "end", "subtitles") == (
        release.root / "data" / "fFjv93ACGo8.mp4",
        "data/fFjv93ACGo8.mp4",
        None,
        None,
        "",
    )
    assert (second.answer, third.media) == ("A", "data/b.mkv")
    assert second.line == "videomme/test-00000-of-00001.parquet:2"
    assert (benchmark.missing, benchmark.missing_rows, benchmark.skipped) == ((), 0, ())


def test_videomme_with_subtitles(release):
    release.table("test-00000-of-00001.parquet", [VIDEOMME, {**VIDEOMME, "question_id": "b", "videoID": "b"}])
    release.table("subtitle/fFjv93ACGo8.srt", SRT)
    release.videos("data/fFjv93ACGo8.mp4", "data/b.MP4")
    spoken, silent = release.read("videomme", subtitles=True).rows
    assert spoken.subtitles == "Hello there,\nhow are you?"
    assert spoken.text.startswith("This video's subtitles are listed below:\nHello there,")
    assert silent.subtitles == "No subtitles available"


def test_missing_videos_are_listed_once(release):
    rows = [{**VIDEOMME, "question_id": f"{video}-{n}", "videoID": video} for video in "abc" for n in range(2)]
    release.table("test-00000-of-00001.parquet", rows)
    release.videos("data/b.mp4")
    benchmark = release.read("videomme")
    assert [row.id for row in benchmark.rows] == ["b-0", "b-1"]
    assert (benchmark.missing, benchmark.missing_rows) == (("a", "c"), 4)
    assert benchmark.describe() == "videomme: 2 questions; 4 left out because of 2 missing videos (a, c)"


def test_every_video_that_is_missing_is_named_in_the_notes(release):
    rows = [{**VIDEOMME, "question_id": f"{video}-{n}", "videoID": video} for video in "abcdef" for n in range(2)]
    release.table("test-00000-of-00001.parquet", [*rows, {**VIDEOMME, "question": ""}])
    release.videos("data/b.mp4")
    total, *listed = release.read("videomme").notes
    assert total.startswith(
        "videomme: 2 questions; 10 left out because of 5 missing videos (a, c, d, ..); 1 cannot be used"
    )
    assert listed[:-1] == [f"{video}: the video is missing" for video in "acdef"]
    assert listed[-1] == "test-00000-of-00001.parquet:13: question is empty: expected a text"
    release.videos(*(f"data/{video}.mp4" for video in "acdef"))
    release.table("test-00000-of-00001.parquet", rows)
    assert release.read("videomme").notes == ()


def test_a_row_that_cannot_be_used_is_skipped(release):
    bad = [{**VIDEOMME, "question_id": "x", "answer": "E"}, {**VIDEOMME, "question_id": "y", "question": ""}]
    release.table("test-00000-of-00001.parquet", [*bad, VIDEOMME])
    release.videos("data/fFjv93ACGo8.mp4")
    benchmark = release.read("videomme")
    assert [row.id for row in benchmark.rows] == ["001-1"]
    assert benchmark.skipped == (
        "test-00000-of-00001.parquet:1: answer 'E' is none of the 4 options: give a letter from A to D",
        "test-00000-of-00001.parquet:2: question is empty: expected a text",
    )


def test_links_are_followed(release, tmp_path_factory):
    """As in the Hub's cache, where every file is a link."""
    blobs = tmp_path_factory.mktemp("blobs")
    release.table("test-00000-of-00001.parquet", [VIDEOMME])
    (blobs / "1").touch()
    release.videos("data/other.mp4")
    (release.root / "data" / "fFjv93ACGo8.mp4").symlink_to(blobs / "1")
    assert release.read("videomme").rows[0].media == "data/fFjv93ACGo8.mp4"


def test_names_do_not_climb_out(release, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.mp4"
    outside.touch()
    names = [str(outside.with_suffix("")), f"../../{outside.parent.name}/x", "."]
    release.table(
        "test-00000-of-00001.parquet", [{**VIDEOMME, "question_id": n, "videoID": n} for n in names] + [VIDEOMME]
    )
    release.videos("data/fFjv93ACGo8.mp4")
    assert release.read("videomme").missing == tuple(names)


def test_longvideobench(release):
    record = {
        "id": "86CxyhFV9MI_0",
        "video_path": "86CxyhFV9MI.mp4",
        "subtitle_path": "86CxyhFV9MI_en.json",
        "question": "Which subtitles appear with the man?",
        "option0": "promisc",
        "option1": "run",
        "option2": "N/A",
        "option3": "N/A",
        "option4": "N/A",
        "correct_choice": 1,
        "duration": 10.0,
        "duration_group": 15,
        "question_category": "TOS",
        "starting_timestamp_for_subtitles": 60.0,
    }
    without_options = {key: value for key, value in record.items() if not key.startswith("option")}
    release.table(
        "lvb_val.json", [record, {**without_options, "id": "b", "candidates": ["x", "y", "z"], "correct_choice": 2}]
    )
    lines = [
        ("00:00:50.000", "00:00:59.000", "before"),
        ("00:01:01.500", "00:01:03.000", "within"),
        ("00:01:11.000", "00:01:12.000", "after"),
    ]
    release.table(
        "subtitles/86CxyhFV9MI_en.json", [{"start": start, "end": end, "line": line} for start, end, line in lines]
    )
    release.videos("videos/86CxyhFV9MI.mp4")
    first, second = release.read("longvideobench", subtitles=True).rows
    assert shown(first, "id", "options", "answer", "task", "category", "subtitles") == (
        "86CxyhFV9MI_0",
        ("promisc", "run"),
        "B",
        "TOS",
        "15",
        "within",
    )
    assert shown(second, "options", "answer") == (("x", "y", "z"), "C")
    release.table("validation-00000-of-00001.parquet", [record])
    (release.root / "lvb_val.json").unlink()
    (row,) = release.read("longvideobench").rows
    assert shown(row, "answer", "category", "subtitles") == ("B", "15", "")


def test_subtitles_of_both_clocks(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"timestamp": [1.0, 2.0], "text": "a\nb"}, {"timestamp": [3.0, None], "text": "c"}]))
    assert read_timed_lines(path, 0.0, 10.0) == "a b\nc"
    assert read_timed_lines(path, 2.5, 10.0) == "c"
    path.write_text('[{"start": "1:2"}]')
    with pytest.raises(DataError, match="is not a list of timed subtitles"):
        read_timed_lines(path, 0.0, 10.0)


def test_subtitles_in_old_files(tmp_path):
    path = tmp_path / "s.srt"
    path.write_bytes(SRT.replace("\n", "\r\n").encode() + b"\xff\xfe")
    assert read_srt(path).splitlines()[:2] == ["Hello there,", "how are you?"]
    path.write_text("no times here")
    assert read_srt(path) == ""


def test_mmvu(release):
    record = {
        "id": "validation_0",
        "video": "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/Civil_Engineering/0.mp4",
        "question_type": "multiple-choice",
        "question": "Which soil?",
        "choices": {"A": "clay", "B": "sand", "C": "silt", "D": "", "E": ""},
        "answer": "B",
    }
    open_ended = {**record, "id": "validation_1", "question_type": "open-ended"}
    hub = {**record, "id": "validation_2", "video_path": "videos/Art/7.mp4", "video": None}
    release.table("validation.json", [record, open_ended, hub])
    release.videos("videos/Civil_Engineering/0.mp4", "videos/Art/7.mp4")
    benchmark = release.read("mmvu")
    first, second = benchmark.rows
    assert shown(first, "id", "options", "answer", "task", "category", "media") == (
        "validation_0",
        ("clay", "sand", "silt"),
        "B",
        "Civil_Engineering",
        "Engineering",
        "videos/Civil_Engineering/0.mp4",
    )
    assert shown(second, "id", "task", "category") == ("validation_2", "Art", "Humanities_and_Social_Science")
    assert benchmark.skipped == ()


def test_videommmu(release):
    choices = {"id": "validation_Clinical_Medicine_3", "question": "Which?", "options": ["x", "y"], "answer": "B"}
    for track in ("Perception", "Comprehension", "Adaptation"):
        release.table(f"{track}/test-00000-of-00001.parquet", [{**choices, "question_type": "multiple-choice"}])
    opened = {**choices, "id": "dev_Math_1", "options": [], "answer": "0.5", "question": "How much?"}
    lettered = {**choices, "id": "dev_Math_2", "options": ["A. x", "B. y"]}
    release.table("Adaptation/test-00000-of-00001.parquet", [choices, opened, lettered])
    release.videos("Medicine/validation_Clinical_Medicine_3.mp4", "Science/dev_Math_1.mp4", "Science/dev_Math_2.mp4")
    rows = {row.id: row for row in release.read("videommmu").rows}
    assert list(rows) == [
        "Perception/validation_Clinical_Medicine_3",
        "Comprehension/validation_Clinical_Medicine_3",
        "Adaptation/validation_Clinical_Medicine_3",
        "Adaptation/dev_Math_1",
        "Adaptation/dev_Math_2",
    ]
    perception, _, adaptation, number, plain = rows.values()
    assert shown(perception, "question", "kind", "task", "category") == (
        "Which?",
        "exact_match",
        "Clinical_Medicine",
        "Perception",
    )
    assert adaptation.question.endswith(
        "answer the following multi-choice question. The image for this question is at the end of the video.\nWhich?"
    )
    assert "open-ended" in number.question
    assert shown(number, "kind", "answer", "options", "media") == ("math", "0.5", (), "Science/dev_Math_1.mp4")
    assert plain.options == ("x", "y")


def test_mvp(release):
    subsets = ("human_object_interactions", "intuitive_physics", "robot_object_interactions", "temporal_reasoning")
    for number, subset in enumerate(subsets):
        records = [
            {
                "video_id": f"ssv2_12_{which}",
                "video_path": f"/ssv2/{number}{which}.webm",
                "question": "Which way?",
                "candidates": "['left', 'right']" if number else ["left", "right"],
                "answer": ("left", "right")[which],
                "source": "ssv2",
            }
            for which in (0, 1)
        ]
        release.table(f"{subset}/mini-00000-of-00001.parquet", records)
        release.table(f"{subset}/full-00000-of-00001.parquet", records[:1])
        release.videos(*(f"videos/ssv2/{number}{which}.webm" for which in (0, 1)))
    rows = release.read("mvp").rows
    assert len(rows) == 8
    assert shown(rows[2], "id", "options", "answer", "task", "category", "pair", "response_prefix", "media") == (
        "intuitive_physics/ssv2_12_0",
        ("left", "right"),
        "A",
        "intuitive_physics",
        "ssv2",
        "intuitive_physics/ssv2_12",
        r"\boxed{Answer:",
        "videos/ssv2/10.webm",
    )
    assert [(row.pair, row.answer) for row in rows[:2]] == [
        ("human_object_interactions/ssv2_12", letter) for letter in "AB"
    ]
    assert len({row.pair for row in rows}) == 4
    assert len(release.read("mvp_full").rows) == 4


@pytest.mark.parametrize("form", ["txt", "parquet", "json"])
def test_charades(release, form):
    moments = [
        ("3MSZA", 24.3, 30.4, "person turn a light on."),
        ("3MSZA", 9.0, 5.5, "they sit."),
        ("0A8TF", 4.0, 4.0, "x"),
    ]
    if form == "txt":
        text = "".join(f"{video} {start} {end}##{description}\n" for video, start, end, description in moments)
        release.table("Charades/charades_sta_test.txt", text + "a broken line\n")
    elif form == "parquet":
        rows = [
            {"video": f"{v}.mp4", "caption": description, "timestamp": [start, end]}
            for v, start, end, description in moments
        ]
        release.table("data/test-00000-of-00001.parquet", rows)
    else:
        rows = [
            {"video": f"{v}.mp4", "description": description, "timestamps": [s, e]} for v, s, e, description in moments
        ]
        release.table("test.json", rows)
    release.videos("Charades_v1_480/3MSZA.mp4", "Charades_v1_480/0A8TF.mp4")
    benchmark = release.read("charades")
    assert [shown(row, "id", "question", "answer", "kind", "options", "media") for row in benchmark.rows] == [
        ("3MSZA-1", "person turn a light on.", [[24.3, 30.4]], "iou", (), "Charades_v1_480/3MSZA.mp4"),
        ("3MSZA-2", "they sit.", [[5.5, 9.0]], "iou", (), "Charades_v1_480/3MSZA.mp4"),
    ]
    assert benchmark.skipped[0].endswith("nothing can overlap it")
    assert len(benchmark.skipped) == 1 + (form == "txt")


def test_activitynet(release):
    captions = {
        "v_uqiMw7tQ1Cc": {
            "duration": 55.15,
            "timestamps": [[0.28, 55.15], [13.79, 54.32]],
            "sentences": ["One.", " Two. "],
        },
        "v_gone": {"duration": 5, "timestamps": [[0, 1]], "sentences": ["Three."]},
    }
    release.table("captions/val_2.json", captions)
    release.videos("videos/v_uqiMw7tQ1Cc.mkv")
    benchmark = release.read("activitynet")
    assert [shown(row, "id", "question", "answer", "media") for row in benchmark.rows] == [
        ("v_uqiMw7tQ1Cc-1", "One.", [[0.28, 55.15]], "videos/v_uqiMw7tQ1Cc.mkv"),
        ("v_uqiMw7tQ1Cc-2", "Two.", [[13.79, 54.32]], "videos/v_uqiMw7tQ1Cc.mkv"),
    ]
    assert benchmark.missing == ("v_gone",)
    release.table("val_2.json", [{"video": "v_uqiMw7tQ1Cc.mp4", "caption": "One.", "timestamp": [0.28, 55.15]}])
    assert [row.id for row in release.read("activitynet").rows] == ["v_uqiMw7tQ1Cc-1"]


def test_nextgqa(release):
    base = {"video_id": "4010069381", "frame_count": "369", "width": "640", "height": "480", "type": "CW"}
    choices = {"a0": "to rest", "a1": "to play", "a2": "to eat", "a3": "to run", "a4": "to jump"}
    questions = [
        {**base, "question": "why did he sit", "answer": "to eat", "qid": "6", **choices},
        {**base, "question": "why did she sit", "answer": "3", "qid": "7", **choices},
        {**base, "question": "why did they sit", "answer": "a4", "qid": "8", **choices},
        {**base, "question": "no moment", "answer": "to eat", "qid": "9", **choices},
    ]
    release.table("nextgqa/test.csv", questions)
    location = {"6": [[0.0, 3.5], [9.0, 7.0], [4, 4]], "7": [[1, 2]], "8": [[1, 2]]}
    release.table("nextgqa/gsub_test.json", {"4010069381": {"duration": 12.3, "location": location, "fps": 30}})
    release.table("nextgqa/map_vid_vidorID.json", {"4010069381": "1164/4010069381"})
    release.videos("NExTVideo/1164/4010069381.mp4")
    benchmark = release.read("nextgqa")
    assert [shown(row, "id", "answer", "kind", "task") for row in benchmark.rows] == [
        ("4010069381_6", ["C", [[0.0, 3.5], [7.0, 9.0]]], "gqa", "CW"),
        ("4010069381_7", ["D", [[1.0, 2.0]]], "gqa", "CW"),
        ("4010069381_8", ["E", [[1.0, 2.0]]], "gqa", "CW"),
    ]
    assert benchmark.rows[0].options == tuple(choices.values())
    assert benchmark.rows[0].media == "NExTVideo/1164/4010069381.mp4"
    assert benchmark.skipped == ("nextgqa/test.csv:4: gsub_test.json holds no moment of video 4010069381, question 9",)


SEQUENCE = {
    "video": "USNP1.mp4",
    "question": "What happened after?",
    "candidates": ["Ate.", "Sat.", "Ran."],
    "answer": "Sat.",
    "start": 1.2999999999999998,
    "end": 15.4,
}
COUNT = {"video": "video_10.mp4", "question": "How many?", "candidates": ["3", "4"], "answer": "3"}


def test_mvbench_uncut(release):
    release.table("json/action_sequence.json", [SEQUENCE, {**SEQUENCE, "start": 5, "end": 5}])
    release.table("json/action_count.json", [{**COUNT, "start": 0, "end": 9}])
    release.table("json/unknown.json", [COUNT])
    release.videos("video/star/Charades_v1_480/USNP1.mp4", "video/data0613/perception/videos/video_10.mp4")
    benchmark = release.read("mvbench")
    count, sequence = benchmark.rows
    assert shown(sequence, "id", "options", "answer", "task", "start", "end", "media") == (
        "action_sequence-0",
        ("Ate.", "Sat.", "Ran."),
        "B",
        "action_sequence",
        1.2999999999999998,
        15.4,
        "video/star/Charades_v1_480/USNP1.mp4",
    )
    assert shown(count, "answer", "start", "end") == ("A", None, None)  # its videos are not parts
    assert len(benchmark.skipped) == 18 + 1
    assert benchmark.skipped[0] == "action_antonym.json: the task's file is missing"
    assert benchmark.skipped[-1].startswith("json/action_sequence.json:2: end 5 is not after start 5")


def test_mvbench_cut(release):
    parts = ["0.0_15.4", "1.2999999999999998_15.4", "1.2999999999999998_9", "20.5_30"]
    rows = [
        {**SEQUENCE, "start": float(start), "end": float(end)} for start, end in (part.split("_") for part in parts)
    ]
    named = [{**row, "video": f"USNP1_{part}.mp4"} for row, part in zip(rows, parts)]
    release.table("json/action_sequence.json", [*rows, *named, {**SEQUENCE, "start": 2.0}])
    release.videos(*(f"star/Charades_segment/USNP1_{part}.mp4" for part in parts), "star/Charades_v1_480/USNP1.mp4")
    *cut, uncut = release.read("mvbench").rows
    assert [row.media for row in cut] == [f"star/Charades_segment/USNP1_{part}.mp4" for part in parts] * 2
    assert {shown(row, "start", "end") for row in cut} == {(None, None)}  # they have been cut already
    assert shown(uncut, "media", "start", "end") == ("star/Charades_v1_480/USNP1.mp4", 2.0, 15.4)


def test_mvbench_folders_of_frames(release):
    clip = "friends_s03e19_seg02_clip_10"
    release.table("json/episodic_reasoning.json", [{**SEQUENCE, "video": clip, "start": 1.0, "end": 3.0}])
    frames = release.root / "video" / "tvqa" / "frames_fps3_hq" / clip
    frames.mkdir(parents=True)
    for number in range(1, 13):
        Image.fromarray(np.full((64, 96, 3), number * 10, np.uint8)).save(frames / f"{number:05d}.jpg")
    (row,) = release.read("mvbench").rows
    assert shown(row, "video", "frames_fps", "start", "end") == (frames, 3.0, 1.0, 3.0)
    spec = SPEC.with_overrides(fps=row.frames_fps)
    read = read_frames(row.source(), spec, FrameSelection(start=row.start, end=row.end))
    assert read.seconds.tolist() == pytest.approx([third / 3 for third in range(3, 10)])
    levels = read.pixels.reshape(len(read.pixels), -1).mean(axis=1)
    assert levels == pytest.approx([(index + 1) * 10 for index in read.indices], abs=2)
    assert load_vision(row.source(), spec, FrameSelection(start=row.start, end=row.end)).kind == "video"


def test_a_part_of_a_real_video_is_read(release):
    release.table("json/action_sequence.json", [{**SEQUENCE, "start": 1.0, "end": 2.0}])
    (release.root / "star" / "Charades_v1_480").mkdir(parents=True)
    write_clip(release.root / "star" / "Charades_v1_480" / "USNP1.mp4", frames=60, fps=20)
    (row,) = release.read("mvbench").rows
    frames = read_video(row.source(), SPEC, FrameSelection(start=row.start, end=row.end))
    assert all(20 <= index <= 40 for index in read_codes(frames.pixels))


def test_frame_limits():
    """The frames of the paper's table of evaluation settings, and what every benchmark shares."""
    limits = {
        name: [{**COMMON_LIMITS, **FAMILIES[family].benchmark_limits(name)} for family in ("qwen2_5_vl", "qwen3_vl")]
        for name in BENCHMARKS
    }
    frames = {name: tuple(family["max_frames"] for family in families) for name, families in limits.items()}
    usual = dict.fromkeys(BENCHMARKS, (256, 2048))
    assert frames == usual | {"videommmu": (64, 64), "mmvu": (64, 2048), "activitynet": (512, 2048)}
    for families in limits.values():
        for family, video_tokens in zip(families, (16_384, 128_000)):
            spec = SPEC.with_overrides(**family)
            assert (spec.fps, spec.sample_by, spec.video_tokens) == (2.0, "index", video_tokens)
            assert (spec.frame_min_tokens, spec.frame_max_tokens) == (16, 768)
            assert (spec.image_min_tokens, spec.image_max_tokens) == (128, 16_384)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_families_name_benchmarks_that_exist(family):
    assert family.benchmark_frames.keys() <= BENCHMARKS.keys()


def test_names_and_options():
    with pytest.raises(
        ConfigError, match=r"benchmark 'video-mme' is unknown: choose from activitynet, charades, .*videommmu"
    ):
        read_benchmark("video-mme", ".")
    with pytest.raises(ConfigError, match=r"MVBench has no subtitles: .*longvideobench and videomme have them"):
        read_benchmark("mvbench", ".", subtitles=True)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_folders_that_hold_something_else(name, tmp_path):
    with pytest.raises(DataError, match="is not a folder: give the folder with"):
        read_benchmark(name, tmp_path / "none")
    with pytest.raises(DataError, match=r"holds none of .*--data-root") as caught:
        read_benchmark(name, tmp_path)
    assert BENCHMARKS[name].title in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("videomme", "test-0.parquet", "not parquet", r"test-0.parquet cannot be read \(.*\): download it again"),
        ("longvideobench", "lvb_val.json", "[{", "lvb_val.json cannot be read"),
        ("longvideobench", "lvb_val.json", "3", "lvb_val.json holds a int: expected a list of records"),
        ("longvideobench", "lvb_val.json", "[3]", "entry 1 is of type int: expected a record"),
        ("mvbench", "json/other.json", "[]", "holds none of MVBench's tasks"),
        ("mmvu", "validation.json", "[]", "holds nothing of MMVU .* that can be evaluated: mmvu: 0 questions"),
    ],
)
def test_damaged_files(release, name, file, content, message):
    release.videos(file)
    (release.root / file).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        release.read(name)
    assert "\n" not in str(caught.value)


def test_no_video_is_there(release):
    release.table("test-00000-of-00001.parquet", [VIDEOMME])
    with pytest.raises(
        DataError, match=r"Video-MME .*: 0 questions; 1 left out because of 1 missing video \(fFjv93ACGo8\)$"
    ):
        release.read("videomme")


def test_ids_are_unique(release):
    for number in range(2):
        release.table(f"test-0000{number}-of-00002.parquet", [VIDEOMME])
    release.videos("data/fFjv93ACGo8.mp4")
    with pytest.raises(DataError, match=r"test-00001.*:1: test-00000.*:1 has the id '001-1' too"):
        release.read("videomme")


def test_parquet_needs_pyarrow(release, monkeypatch):
    release.table("test-00000-of-00001.parquet", [VIDEOMME])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="needs the package pyarrow to be read: install it with `pip install pyarrow`"):
        release.read("videomme")


def test_no_heavy_package_is_loaded_before_it_is_needed():
    code = (
        "import sys, mlxvr.data.benchmarks\n"
        "sys.stdout.write(' '.join(sorted({'pyarrow', 'mlx', 'mlx_vlm', 'huggingface_hub'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == ""
