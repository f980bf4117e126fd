"""Datasets: what a row may be, and that every other row is refused by file and line."""

import json
import re
import sys
from pathlib import Path

import pytest

import mlxvr
from mlxvr.data.option_letters import strip_letters
from mlxvr.data.rows import Row, load_rows, make_locator, make_row, scan_rows, to_record
from mlxvr.errors import DataError
from mlxvr.grading.reward import score

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from shellgame.clips import held_out_set, training_set

QUESTION = {"id": "a", "video": "a.mp4", "question": "Which cup?", "options": ["left", "right"], "answer": "B"}
MATH = {"id": "m", "question": "What is 2 + 2?", "answer": "4", "kind": "math"}
GROUND = {"id": "g", "video": "a.mp4", "question": "the ball is seen.", "answer": [0.3, 4.5], "kind": "iou"}
BOTH = {**QUESTION, "kind": "gqa", "answer": {"answer": "A", "segments": [[0.3, 4.5]]}}


@pytest.fixture
def write(tmp_path):
    def write_rows(*records, name="d.jsonl"):
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write_rows


def test_a_full_row(write, tmp_path):
    more = {"start": 1, "end": 4.5, "task": "t", "category": "c", "pair": "p", "subtitles": "Hi.", "unknown": [1]}
    path = write({**QUESTION, **more, "response_prefix": r"\boxed{Answer:"})
    assert load_rows(path) == [
        Row(
            id="a",
            question="Which cup?",
            answer="B",
            kind="exact_match",
            video=tmp_path / "a.mp4",
            options=("left", "right"),
            start=1.0,
            end=4.5,
            task="t",
            category="c",
            pair="p",
            subtitles="Hi.",
            response_prefix=r"\boxed{Answer:",
            media="a.mp4",
            line=f"{path}:1",
        )
    ]


@pytest.mark.parametrize("record", [QUESTION, MATH, GROUND, BOTH, {**MATH, "image": "x.png"}])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"answer": None},
        {"task": "t", "category": "c", "pair": "p", "subtitles": "Hi.", "response_prefix": "Answer:"},
        {"start": 0, "end": 4.5, "frames_fps": 3},
    ],
)
def test_a_row_can_be_written(tmp_path, record, more):
    """And is the same when it is read again, in a file of its own."""
    if "start" in more and "video" not in record:
        more = {}
    locate = make_locator(tmp_path, None)
    row = make_row({**record, **more}, line="d:1", locate=locate, labelled=False)
    written = json.loads(json.dumps(to_record(row, media=row.media)))
    assert make_row(written, line="d:1", locate=locate, labelled=False) == row
    assert set(written) <= {*record, *more, "kind"}


def test_text_alone_and_an_image(write, tmp_path):
    text, image = load_rows(write({**MATH, "video": None, "image": None}, {**MATH, "id": 7, "image": "p/x.png"}))
    assert (text.source(), text.media, text.kind, text.answer, text.ask_kind) == (None, "", "math", "4", "qa")
    assert (image.id, image.source(), image.media) == ("7", tmp_path / "p" / "x.png", "p/x.png")


@pytest.mark.parametrize(
    ("record", "kind", "ask_kind", "answer"),
    [
        (GROUND, "iou", "grounding", [[0.3, 4.5]]),
        ({**GROUND, "answer": [[0, 1], [2, 3.5]]}, "iou", "grounding", [[0.0, 1.0], [2.0, 3.5]]),
        ({**GROUND, "answer": "[0.3, 4.5]", "kind": "grounding"}, "iou", "grounding", [[0.3, 4.5]]),
        (BOTH, "gqa", "grounded_qa", ["A", [[0.3, 4.5]]]),
        ({**BOTH, "answer": "B <> [1, 2]"}, "gqa", "grounded_qa", ["B", [[1.0, 2.0]]]),
        (
            {**BOTH, "answer": "B<>[[1, 2], [3, 4]]"},
            "gqa",
            "grounded_qa",
            ["B", [[1.0, 2.0], [3.0, 4.0]]],
        ),
        ({**BOTH, "answer": ["A", [1, 2]]}, "gqa", "grounded_qa", ["A", [[1.0, 2.0]]]),
        ({**BOTH, "kind": "grounded_qa"}, "gqa", "grounded_qa", ["A", [[0.3, 4.5]]]),
        ({**QUESTION, "kind": "qa"}, "exact_match", "qa", "B"),
        ({**QUESTION, "kind": None}, "exact_match", "qa", "B"),
        ({**QUESTION, "answer": "(B)"}, "exact_match", "qa", "B"),
        ({**QUESTION, "answer": "B. right"}, "exact_match", "qa", "B"),
        ({**QUESTION, "answer": "Right"}, "exact_match", "qa", "B"),
        ({**BOTH, "answer": ["right", [1, 2]]}, "gqa", "grounded_qa", ["B", [[1.0, 2.0]]]),
        ({**QUESTION, "kind": "math", "options": ["3", "4"], "answer": 4}, "exact_match", "qa", "B"),
        ({**MATH, "answer": 4}, "math", "qa", "4"),
        ({**MATH, "answer": 0.5}, "math", "qa", "0.5"),
    ],
)
def test_answers_have_one_form(write, record, kind, ask_kind, answer):
    (row,) = load_rows(write(record))
    assert (row.kind, row.ask_kind, row.answer) == (kind, ask_kind, answer)


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["left", "right"], " RIGHT ", "B"),
        (["left", "right"], "B)", "B"),
        (["left", "right"], "(B) right", "B"),
        (["left", "right"], "B: the right one", "B"),
        (["A. left", "B. right"], "b. right", "B"),
        (["P. M.", "A. M."], "A. M.", "B"),  # the text of an option, though it begins like a letter
        (["B", "A"], "A", "A"),  # a letter alone is a letter
        (["A dog", "a cat"], "A dog", "A"),
        (["same", "same"], "same", "A"),
    ],
)
def test_a_choice_is_held_by_its_letter(write, options, answer, letter):
    """So that the reward, which knows no options, pays for the letter that the prompt has for it."""
    (row,) = load_rows(write({**QUESTION, "options": options, "answer": answer}))
    assert row.answer == letter
    assert score(f"\\boxed{{{letter}}}<think>r</think>\\boxed{{({letter})}}", row.answer, row.kind).total == 3.0


def without(record, *keys):
    return {key: value for key, value in record.items() if key not in keys}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "the line is not JSON (Expecting property name enclosed in double quotes): write one JSON object"),
        ("[" * 100_000, "the line is not JSON (it nests too deep"),
        ('{"id": ' + "9" * 5000 + "}", "the line is not JSON (it nests too deep or has too long a number)"),
        ("[1]", "the line holds [1]: expected a JSON object"),
        (json.dumps({**MATH, "question": "\ud800"}), "the line is not UTF-8"),
        (without(QUESTION, "id"), "the field 'id' is missing"),
        (without(QUESTION, "question"), "the field 'question' is missing"),
        (without(QUESTION, "answer"), "the field 'answer' is missing"),
        ({**QUESTION, "answer": None}, "the field 'answer' is missing"),
        ({**QUESTION, "id": ""}, "id is empty"),
        ({**QUESTION, "id": True}, "id is True: expected a text"),
        ({**QUESTION, "question": " \n"}, "question is empty: expected a text"),
        ({**QUESTION, "question": 3}, "question is 3: expected a text"),
        ({**QUESTION, "kind": "exact"}, "kind 'exact' is unknown: use one of exact_match, math, iou, gqa"),
        ({**QUESTION, "kind": ["iou"]}, "kind ['iou'] is unknown"),
        ({**QUESTION, "options": "left"}, "options are 'left': expected a list of texts"),
        ({**QUESTION, "options": ["left", 2]}, "options are ['left', 2]: expected a list of texts"),
        (
            {**QUESTION, "options": ["left", " "]},
            "options are ['left', ' ']: expected a list of texts, none of them empty",
        ),
        ({**QUESTION, "options": {"A": "left"}}, "options are {'A': 'left'}: expected a list"),
        ({**QUESTION, "options": ["x"] * 27}, "27 options are more than there are letters"),
        ({**GROUND, "answer": [0, 10**400]}, "answer is [0, 1000000000"),
        ({**QUESTION, "end": 10**400}, "end is 1000000000"),
        ({**GROUND, "options": ["x"]}, "a row of kind iou has no options"),
        ({**QUESTION, "answer": "C"}, "answer 'C' is none of the 2 options: give a letter from A to B"),
        ({**QUESTION, "answer": "middle"}, "answer 'middle' is none of the 2 options"),
        ({**QUESTION, "answer": "A dog"}, "answer 'A dog' is none of the 2 options"),
        ({**QUESTION, "answer": ["B"]}, "answer is ['B']: expected a text"),
        ({**QUESTION, "answer": " "}, "answer is ' ': expected a text"),
        ({**QUESTION, "answer": True}, "answer is True: expected a text"),
        ({**MATH, "answer": float("nan")}, "answer is nan: expected a text"),
        ({**GROUND, "answer": [4.5, 0.3]}, "answer is [4.5, 0.3]: expected [start, end] in seconds, start before end"),
        ({**GROUND, "answer": [1, 1]}, "answer is [1, 1]: expected [start, end]"),
        ({**GROUND, "answer": [-1, 1]}, "answer is [-1, 1]: expected [start, end]"),
        ({**GROUND, "answer": [1, 2, 3]}, "answer is [1, 2, 3]: expected [start, end]"),
        ({**GROUND, "answer": []}, "answer is []: expected [start, end]"),
        ({**GROUND, "answer": [[1, 2], [4, 3]]}, "answer is [[1, 2], [4, 3]]: expected [start, end]"),
        ({**GROUND, "answer": [True, 2]}, "answer is [True, 2]: expected [start, end]"),
        ({**GROUND, "answer": "1 to 2"}, "answer is '1 to 2': expected [start, end]"),
        ({**GROUND, "answer": "[" * 70}, f"answer is '{'[' * 56}...: expected [start, end]"),
        ({**BOTH, "answer": "A"}, "answer is 'A': expected {'answer': .., 'segments': [[start, end]]}"),
        ({**BOTH, "answer": {"answer": "A"}}, "answer is {'answer': 'A'}: expected {'answer': .., 'segments'"),
        ({**BOTH, "answer": [0.3, 4.5]}, "answer 0.3 is none of the 2 options"),
        ({**BOTH, "answer": "C <> [1, 2]"}, "answer 'C' is none of the 2 options"),
        ({**BOTH, "answer": "A <> [2, 1]"}, "answer is '[2, 1]': expected [start, end]"),
        ({**QUESTION, "image": "x.png"}, "the row has both a video and an image: keep one"),
        (without(GROUND, "video"), "a row of kind iou is about times in a video, and there is none: add 'video'"),
        ({**without(BOTH, "video"), "image": "x.png"}, "a row of kind gqa is about times in a video"),
        ({**QUESTION, "video": 5}, "video is 5: expected a text"),
        ({**QUESTION, "start": 3, "end": 3}, "end 3 is not after start 3"),
        ({**QUESTION, "end": 0}, "end 0 is not after start 0"),
        ({**QUESTION, "start": -1}, "start is -1: expected a number that is at least 0"),
        ({**QUESTION, "start": "1"}, "start is '1': expected a number that is at least 0"),
        ({**QUESTION, "frames_fps": 0}, "frames_fps is 0"),
        ({**MATH, "start": 1}, "start is for videos, and the row has none"),
        ({**QUESTION, "video": "../a.mp4"}, "'../a.mp4' leaves the folder of the file"),
        ({**QUESTION, "video": "b/../../a.mp4"}, "'b/../../a.mp4' leaves the folder of the file"),
        ({**QUESTION, "video": "/etc/hosts"}, "'/etc/hosts' is an absolute path: make it relative to the file"),
        (
            {**QUESTION, "video": "https://x/a.mp4"},
            "https://x/a.mp4 is a URL, and only local files are read",
        ),
    ],
)
def test_what_is_refused(write, record, message):
    path = write(MATH, record)
    with pytest.raises(DataError) as caught:
        load_rows(path)
    error = str(caught.value)
    assert error.startswith(f"{path}:2: {message}")
    assert "\n" not in error


def test_ids_are_unique(write):
    path = write(MATH, "", MATH)
    with pytest.raises(DataError, match=re.escape(f"{path}:3: {path}:1 has the id 'm' too")):
        load_rows(path)


def test_bad_rows_can_be_collected(write):
    path = write(MATH, "{", {**QUESTION, "kind": "x"}, QUESTION, MATH)
    path.write_bytes(path.read_bytes() + b'{"id": "\xff"}\n')
    bad = []
    assert [row.id for row in load_rows(path, bad_rows=bad)] == ["m", "a"]
    assert [str(error).split(": ")[0] for error in bad] == [f"{path}:{number}" for number in (2, 3, 5, 6)]
    assert str(bad[-1]).endswith("the line is not UTF-8: save the file as UTF-8")


def test_files_that_hold_no_rows(write, tmp_path):
    for path, message in [
        (tmp_path / "none.jsonl", "does not exist"),
        (tmp_path, "is a folder"),
        (write("", name="empty.jsonl"), "holds no row"),
    ]:
        with pytest.raises(DataError, match=message):
            load_rows(path)
    with pytest.raises(DataError, match="holds no usable row"):
        load_rows(write("{"), bad_rows=[])


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(MATH).encode() + b"\r\n\r\n")
    assert load_rows(path)[0].id == "m"


def test_answers_may_be_left_out(write):
    path = write(without(QUESTION, "answer"), {**GROUND, "answer": None})
    assert [row.answer for row in load_rows(path, labelled=False)] == [None, None]
    with pytest.raises(DataError, match="expected a text"):
        load_rows(write({**QUESTION, "answer": ["B"]}), labelled=False)


def test_links_are_followed_to_where_they_lead(write, tmp_path):
    outside, data = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    data.mkdir()
    (outside / "a.mp4").touch()
    (data / "real.mp4").touch()
    (data / "out.mp4").symlink_to(outside / "a.mp4")
    (data / "within.mp4").symlink_to(data / "real.mp4")
    path = write({**QUESTION, "video": "within.mp4"}, {**QUESTION, "id": "b", "video": "out.mp4"}, name="data/d.jsonl")
    good, bad = scan_rows(path)
    assert good.video == data / "within.mp4"
    assert str(bad).startswith(f"{path}:2: 'out.mp4' leaves the folder of the file")
    allowed = load_rows(path, media_root=data)
    assert allowed[1].video == data / "out.mp4"


def test_a_media_root_is_the_border(write, tmp_path):
    root = tmp_path / "media"
    inside = write({**QUESTION, "video": "x/a.mp4"}, {**QUESTION, "id": "b", "video": str(root / "a.mp4")})
    assert [row.video for row in load_rows(inside, media_root=root)] == [root / "x" / "a.mp4", root / "a.mp4"]
    for video in ("../a.mp4", str(tmp_path / "mediator" / "a.mp4"), str(root / ".." / "a.mp4")):
        with pytest.raises(DataError, match="leaves the media root"):
            load_rows(write({**QUESTION, "video": video}), media_root=root)


def test_a_folder_of_frames(write, tmp_path):
    (tmp_path / "f").mkdir()
    for name in ("00002.jpg", "00001.jpg", "notes.txt", "00010.PNG"):
        (tmp_path / "f" / name).touch()
    rows = load_rows(
        write({**QUESTION, "video": "f", "frames_fps": 3}, {**QUESTION, "id": "b", "video": "none", "frames_fps": 3})
    )
    assert [path.name for path in rows[0].source()] == ["00001.jpg", "00002.jpg", "00010.PNG"]
    with pytest.raises(DataError, match=r"d\.jsonl:2: .*none is not a folder of jpg or png frames"):
        rows[1].source()


def test_subtitles_go_before_the_question(write):
    plain, subtitled = load_rows(write(QUESTION, {**QUESTION, "id": "b", "subtitles": "Hello.\nBye."}))
    assert plain.text == "Which cup?"
    assert subtitled.text == "This video's subtitles are listed below:\nHello.\nBye.\nWhich cup?"


@pytest.mark.parametrize(
    ("options", "stripped"),
    [
        (["A. red", "B. blue"], ["red", "blue"]),
        (["(A) red", "(B) blue"], ["red", "blue"]),
        (["A: red", "B) blue"], ["red", "blue"]),
        (["A. red", "blue"], ["A. red", "blue"]),
        (["B. red", "A. blue"], ["B. red", "A. blue"]),
        (["A.", "B."], ["A.", "B."]),
        (["A red", "B blue"], ["A red", "B blue"]),
        ([], []),
    ],
)
def test_letters_before_options(options, stripped):
    assert strip_letters(options) == stripped


def test_the_bundled_clips_are_a_dataset():
    path = Path(mlxvr.__file__).parent / "demo" / "clips.jsonl"
    rows = load_rows(path)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row.id, row.ask_kind, row.task, row.category) for row in rows] == [
        (record["id"], record["kind"], record["about"], record["group"]) for record in records
    ]
    assert all(row.source().is_file() for row in rows)
    assert {row.kind for row in rows} == {"exact_match", "iou", "gqa"}


@pytest.mark.parametrize(("make", "seed"), [(held_out_set, 7), (training_set, 13)])
def test_the_shell_game_writes_datasets(write, make, seed):
    """Every record is a row. With these seeds a single moment, `[6.8, 6.8]`, comes up first, and is drawn again."""
    records = [record for _, _, lines in make(seed, 64) for record in lines]
    results = list(scan_rows(write(*records)))
    assert [row.id for row in results if isinstance(row, Row)] == [record["id"] for record in records]
    assert {row.kind for row in results} == {"exact_match", "iou", "gqa"}


def test_a_single_moment_of_the_shell_game_is_refused(write):
    records = [record for _, _, lines in held_out_set(seed=7, clips=64) for record in lines]
    times = [number for number, record in enumerate(records) if record["kind"] == "grounding"]
    assert len(times) > 5
    records[times[3]]["answer"] = "[6.8, 6.8]"
    results = list(scan_rows(write(*records)))
    assert [number for number, row in enumerate(results) if not isinstance(row, Row)] == [times[3]]
    assert f"d.jsonl:{times[3] + 1}: answer is '[6.8, 6.8]'" in str(results[times[3]])
