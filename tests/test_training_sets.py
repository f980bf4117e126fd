"""Formats of training sets: small files in the layouts of the public mix, and the rows that are expected, by hand."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlxvr.data.rows import Row, load_rows, make_locator, make_row, to_record
from mlxvr.data.training_sets import FORMATS, format_name, read_rows
from mlxvr.data.training_sets.wording import boxed, choice, is_formula, plain_question, split_options
from mlxvr.errors import ConfigError, DataError

DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

DAPO = {"prompt": "What is $2 + 2$?", "solution": "4", "source_prompt": []}
VIRL = {
    "question": "<image>Which angle is larger?\nChoices:\n(A) ABC\n(B) BCD",
    "answer": "\\boxed{B}",
    "image": ["images/1.png"],
    "category": "Geometry",
    "qid": "1",
}
THINKLITE = {"problem": "<image>How many balls?", "ground_truth": "3", "image": "g/7.png", "problem_type": "math"}
VIDEO_R1 = {
    "problem_id": 1,
    "problem": "What does he do?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. run", "B. jump"],
    "solution": "<answer>B</answer>",
    "path": "./clips/a.mp4",
    "data_source": "PerceptionTest",
}
TVBENCH = {"video": "a.mp4", "question": "What comes first?", "candidates": ["A jump", "A run"], "answer": "A run"}
STI = {
    "Video": "s.mp4",
    "Task": "Displacement",
    "time_start": 0.0,
    "time_end": 4.5,
    "Question": "How far does the car go?",
    "Candidates": {"A": "1 m", "B": "2 m", "C": "3 m"},
    "Answer": "C",
}
MMR = {
    "video": "Level 1 to 100.mp4",
    "question": "How does he do it?",
    "options": ["(A) Gloves.", "(B) A film.", "(C) It is an LED.", ""],
    "correctAnswer": "(C)",
    "abilityType_L2": "Counterintuitive Reasoning",
}
MOMENT = {"description": "a person  opens\nthe door.", "timestamps": [2.5, 9.0], "video": "AO8RW.mp4"}
TIMER1 = {"sentence": "The man sits down.", "timestamp": [3, 8.25], "video": "t/x.mp4", "qid": "a|0", "duration": 20}
GQA = {
    "question": "why does the boy smile",
    "options": ["A. sun", "B. a dog", "C. cake"],
    "answer": "B",
    "timestamps": [[1.0, 4.0], [9.0, 7.5]],
    "video": "1164/323.mp4",
}
EXAMPLES = {
    "activitynet-tvg": MOMENT,
    "charades-sta": MOMENT,
    "dapo-math": DAPO,
    "mmr-vbench": MMR,
    "next-gqa": GQA,
    "sti-bench": STI,
    "thinklite-vl-hard": THINKLITE,
    "timer1": TIMER1,
    "tvbench": TVBENCH,
    "video-r1": VIDEO_R1,
    "virl": VIRL,
}


@pytest.fixture
def write(tmp_path):
    def write_records(records, name="data.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
        else:
            path.write_text(json.dumps(records, indent=1), encoding="utf-8")
        return path

    return write_records


@pytest.fixture
def read(write):
    def read_one(format, record, **options):
        (row,), left_out = read_rows(write([record]), format=format, **options)
        assert left_out == []
        return row

    return read_one


def shown(row, *names):
    return tuple(getattr(row, name) for name in names)


def test_every_format_has_an_example():
    assert set(EXAMPLES) | {"mlxvr"} == set(FORMATS)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("dapo-math", ("What is $2 + 2$?", (), "4", "math", None, None, "")),
        ("virl", ("Which angle is larger?", ("ABC", "BCD"), "B", "exact_match", None, "images/1.png", "Geometry")),
        ("thinklite-vl-hard", ("How many balls?", (), "3", "math", None, "g/7.png", "")),
        ("video-r1", ("What does he do?", ("run", "jump"), "B", "exact_match", "clips/a.mp4", None, "PerceptionTest")),
        ("tvbench", ("What comes first?", ("A jump", "A run"), "B", "exact_match", "data/a.mp4", None, "data")),
        (
            "sti-bench",
            (
                "From 0.0 s to 4.5 s. How far does the car go?",
                ("1 m", "2 m", "3 m"),
                "C",
                "exact_match",
                "s.mp4",
                None,
                "Displacement",
            ),
        ),
        (
            "mmr-vbench",
            (
                "How does he do it?",
                ("Gloves.", "A film.", "It is an LED."),
                "C",
                "exact_match",
                "Level 1 to 100.mp4",
                None,
                "Counterintuitive Reasoning",
            ),
        ),
        ("charades-sta", ("a person opens the door.", (), [[2.5, 9.0]], "iou", "AO8RW.mp4", None, "")),
        ("activitynet-tvg", ("a person opens the door.", (), [[2.5, 9.0]], "iou", "AO8RW.mp4", None, "")),
        ("timer1", ("The man sits down.", (), [[3.0, 8.25]], "iou", "t/x.mp4", None, "")),
        (
            "next-gqa",
            (
                "why does the boy smile",
                ("sun", "a dog", "cake"),
                ["B", [[1.0, 4.0], [7.5, 9.0]]],
                "gqa",
                "1164/323.mp4",
                None,
                "",
            ),
        ),
    ],
)
def test_a_record_of_each_format(read, tmp_path, format, expected):
    row = read(format, EXAMPLES[format])
    question, options, answer, kind, video, image, category = expected
    assert shown(row, "question", "options", "answer", "kind", "category") == (
        question,
        options,
        answer,
        kind,
        category,
    )
    assert row.video == (tmp_path / video if video else None)
    assert row.image == (tmp_path / image if image else None)
    assert shown(row, "media", "task", "line") == (video or image or "", format, f"{tmp_path / 'data.json'}: entry 1")


@pytest.mark.parametrize("format", sorted(EXAMPLES))
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_files_hold_the_same(write, tmp_path, format, suffix):
    """JSON, JSONL and parquet of the same records give the same rows, ids included."""
    (row,), _ = read_rows(write([EXAMPLES[format]]), format=format)
    (second,), _ = read_rows(write([EXAMPLES[format]], name=f"data{suffix}"), format=format)
    place = f"{tmp_path / 'data'}{suffix}" + (":1" if suffix == ".jsonl" else ": entry 1")
    assert second.line == place
    assert vars(second) == {**vars(row), "line": place}


@pytest.mark.parametrize("format", sorted(EXAMPLES))
def test_a_row_can_be_written_and_read_again(read, tmp_path, format):
    row = read(format, EXAMPLES[format])
    record = json.loads(json.dumps(to_record(row, media=row.media)))
    assert make_row(record, line=row.line, locate=make_locator(tmp_path, None)) == row


def test_names_are_read_kindly():
    public = [
        ("DAPO-Math", "dapo-math"),
        ("VIRL", "virl"),
        ("ViRL", "virl"),
        ("ThinkLite-VL-Hard", "thinklite-vl-hard"),
        ("VideoR1", "video-r1"),
        ("video_r1", "video-r1"),
        ("TVBench", "tvbench"),
        ("STI-Bench", "sti-bench"),
        ("MMR-VBench", "mmr-vbench"),
        ("Charades-STA", "charades-sta"),
        ("charades", "charades-sta"),
        ("ActivityNet-TVG", "activitynet-tvg"),
        ("TimeR1", "timer1"),
        ("NeXT-GQA", "next-gqa"),
        ("nextgqa", "next-gqa"),
        ("mlxvr", "mlxvr"),
    ]
    assert [format_name(name) for name, _ in public] == [name for _, name in public]


@pytest.mark.parametrize("name", ["", "-", "coco", "t", "videor12"])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match=r"format .* is unknown: use one of mlxvr, activitynet-tvg, "):
        format_name(name)


def test_our_own_format(write):
    good = {"id": "a", "question": "2 + 2?", "answer": "4", "kind": "math"}
    path = write([good, {**good, "id": "b", "answer": None}], name="d.jsonl")
    rows, left_out = read_rows(path, skip_bad=True)
    assert rows == load_rows(path, bad_rows=[])
    assert left_out == [f"{path}:2: the field 'answer' is missing: every row needs one"]
    with pytest.raises(DataError, match=r"d\.jsonl:2: the field 'answer'"):
        read_rows(path)
    assert [row.answer for row in read_rows(path, labelled=False)[0]] == ["4", None]


# What a record says, and the reason that is told.
BAD = [
    ("dapo-math", {"prompt": None}, "the field 'prompt' is missing"),
    ("dapo-math", {"prompt": " "}, "prompt is ' ': expected a text"),
    ("dapo-math", {"solution": None}, "the field 'answer' is missing"),
    ("virl", {"image": []}, "the field 'image' is missing"),
    ("virl", {"image": [{"bytes": "x"}]}, "expected a path; write the table's images to files first"),
    ("virl", {"answer": ""}, "the field 'answer' is missing"),
    ("virl", {"image": ["../x.png"]}, "leaves the folder of the file"),
    ("thinklite-vl-hard", {"problem_type": "essay"}, "problem_type is 'essay': expected exact_match or math"),
    ("thinklite-vl-hard", {"problem_type": ["math"]}, r"problem_type is \['math'\]: expected exact_match or math"),
    ("tvbench", {"video": "v" * 5000, "answer": "none"}, "answer 'none' is none of the 2 options"),
    ("video-r1", {"solution": "B"}, r"solution holds no <answer>\.\.</answer>"),
    ("video-r1", {"solution": "<answer>C</answer>"}, "answer 'C' is none of the 2 options"),
    ("video-r1", {"data_type": "audio"}, "data_type is 'audio': expected image or video"),
    ("video-r1", {"path": ""}, "path is '': expected a path"),
    ("tvbench", {"candidates": None}, "the options are None: expected a list of texts"),
    ("tvbench", {"answer": "A swim"}, "answer 'A swim' is none of the 2 options"),
    ("tvbench", {"start": 5, "end": 2}, "end 2 is not after start 5"),
    ("sti-bench", {"Candidates": {"A": "1 m", "C": "2 m"}}, "the options have the letters A, C: expected A, B, C"),
    ("sti-bench", {"Answer": "D"}, "answer 'D' is none of the 3 options"),
    ("mmr-vbench", {"correctAnswer": "(K)"}, r"correctAnswer is '\(K\)': expected the letter of an option"),
    ("charades-sta", {"timestamps": [4.0, 4.0]}, "nothing can overlap it"),
    ("charades-sta", {"timestamps": [0, 10**400]}, "nothing can overlap it"),
    ("charades-sta", {"timestamps": "soon"}, "nothing can overlap it"),
    ("charades-sta", {"timestamps": None}, "the field 'timestamps' is missing"),
    ("timer1", {"sentence": 3}, "sentence is 3: expected a text"),
    ("next-gqa", {"timestamps": []}, "nothing can overlap it"),
    ("next-gqa", {"answer": "E"}, "answer 'E' is none of the 3 options"),
]


@pytest.mark.parametrize(("format", "change", "reason"), BAD)
def test_a_bad_row_is_named(write, format, change, reason):
    good = EXAMPLES[format]
    path = write([good, {**good, **change}, good], name="d.jsonl")
    with pytest.raises(DataError, match=rf"d\.jsonl:2: .*{reason}") as caught:
        read_rows(path, format=format)
    assert str(caught.value).count("d.jsonl:2") == 1
    assert "\n" not in str(caught.value)
    rows, left_out = read_rows(path, format=format, skip_bad=True)
    assert left_out == [str(caught.value)]
    assert [row.line for row in rows] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(("format", "key"), [("charades-sta", "video"), ("tvbench", "video"), ("tvbench", "question")])
def test_half_a_character_is_a_bad_row(write, format, key):
    """JSON can spell out half of a surrogate pair; no path holds it, and no file that is written later."""
    good = EXAMPLES[format]
    path = write([{**good, key: "\U0001f600"}, {**good, key: "\ud83d"}])
    with pytest.raises(DataError, match=r"data\.json: entry 2: a text of the record is not UTF-8"):
        read_rows(path, format=format)
    rows, left_out = read_rows(path, format=format, skip_bad=True)
    assert (len(rows), len(left_out)) == (1, 1)


def test_an_entry_that_is_no_record(write):
    path = write([MOMENT, "x", MOMENT])
    with pytest.raises(DataError, match=r"data\.json: entry 2: a str: expected an object"):
        read_rows(path, format="charades-sta")
    jsonl = path.with_suffix(".jsonl")
    jsonl.write_text(f"{json.dumps(MOMENT)}\n\n{{\n{json.dumps(MOMENT)}\n")
    rows, left_out = read_rows(jsonl, format="charades-sta", skip_bad=True)
    assert ([row.line for row in rows], len(left_out)) == ([f"{jsonl}:1", f"{jsonl}:4"], 1)
    assert left_out[0].startswith(f"{jsonl}:3: the line is not JSON")


def test_what_is_no_part_of_the_mix_is_left_out(write):
    """Without being asked to: several images, and types of problem that the mix does not have."""
    path = write([VIRL, {**VIRL, "image": ["a.png", "b.png"]}])
    rows, left_out = read_rows(path, format="virl")
    assert len(rows) == 1
    assert left_out == [f"{path}: entry 2: 2 files in 'image': the mix has one for each question"]
    path = write([VIDEO_R1, *({**VIDEO_R1, "problem_type": kind} for kind in ("OCR", "free-form", "regression"))])
    rows, left_out = read_rows(path, format="video-r1")
    assert (len(rows), len(left_out)) == (1, 3)
    assert "problem_type is 'OCR': the mix has multiple choice and numerical" in left_out[0]


def test_files_that_cannot_be_read(write, tmp_path):
    for name, message in (("none.json", "does not exist"), ("x.csv", r"is not one of \.json, \.jsonl, \.parquet")):
        with pytest.raises(DataError, match=message):
            read_rows(tmp_path / name, format="virl")
    (tmp_path / "half.json").write_text('[{"a":')
    with pytest.raises(DataError, match=r"half\.json cannot be read"):
        read_rows(tmp_path / "half.json", format="virl", skip_bad=True)
    (tmp_path / "half.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"half\.parquet cannot be read"):
        read_rows(tmp_path / "half.parquet", format="virl", skip_bad=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds none of \*\.json, "):
        read_rows(tmp_path / "empty", format="tvbench")
    with pytest.raises(DataError, match=r"holds no row of the format virl that can be used: .*entry 1: the field"):
        read_rows(write([{}]), format="virl", skip_bad=True)


def test_parquet_without_its_package(write):
    path = write([MOMENT], name="d.parquet")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from mlxvr.errors import DataError\n"
        "from mlxvr.data.training_sets import read_rows\n"
        "try:\n    read_rows(sys.argv[1], format='charades-sta')\n"
        "except DataError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=300)
    assert "d.parquet needs the package pyarrow to be read: install it with `pip install pyarrow`" in done.stdout


def test_ids_hang_on_nothing_but_the_row(write):
    """Not on the place, the file, its form or the other rows; copies are told apart."""
    others = [{**MOMENT, "timestamps": [1.0, float(number)]} for number in range(2, 40)]
    alone = read_rows(write([MOMENT]), format="charades-sta")[0][0]
    rows, _ = read_rows(write([*others, MOMENT, MOMENT, {"description": ""}, MOMENT]), format="charades", skip_bad=True)
    assert [row.id for row in rows[-3:]] == [alone.id, f"{alone.id}-2", f"{alone.id}-3"]
    assert len({row.id for row in rows}) == len(rows) == 41
    assert read_rows(write([MOMENT]), format="activitynet")[0][0].id.partition("-")[0] == "activitynet"


def test_a_media_root(write, tmp_path):
    path = write([{**VIDEO_R1, "path": "../b.mp4"}, VIDEO_R1], name="annotations/v.json")
    rows, left_out = read_rows(path, format="video-r1", media_root=tmp_path / "media", skip_bad=True)
    assert [row.video for row in rows] == [tmp_path / "media" / "clips" / "a.mp4"]
    assert "'../b.mp4' leaves the media root" in left_out[0]


def test_tvbench_is_a_folder(write, tmp_path):
    """One file a task; the videos lie in the task's folder, or together."""
    write([TVBENCH, {**TVBENCH, "answer": "A jump"}], name="json/object_count.json")
    write([{**TVBENCH, "start": 1.5, "end": 4.0, "video": "b.mp4"}], name="json/action_sequence.json")
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / "b.mp4").touch()
    rows, _ = read_rows(tmp_path / "json", format="tvbench", media_root=tmp_path / "video")
    assert [shown(row, "category", "answer", "media", "start", "end") for row in rows] == [
        ("action_sequence", "B", "b.mp4", 1.5, 4.0),
        ("object_count", "B", "object_count/a.mp4", None, None),
        ("object_count", "A", "object_count/a.mp4", None, None),
    ]
    inside, _ = read_rows(tmp_path / "json", format="tvbench")
    assert inside[1].video == tmp_path / "json" / "object_count" / "a.mp4"


def test_numbers_and_images_of_video_r1(read):
    numerical = {**VIDEO_R1, "problem_type": "numerical", "options": [], "solution": "<answer> 5.0\n</answer>"}
    row = read("video-r1", {**numerical, "data_type": "image", "path": "p.png"})
    assert shown(row, "kind", "answer", "options", "media", "video") == ("math", "5.0", (), "p.png", None)


def test_mmr_letters_close_up(read):
    """An option that is empty is none, and those behind it move up with the answer."""
    row = read("mmr-vbench", {**MMR, "options": ["(A) Gloves.", "", "(C) A film.", "(D) An LED."]})
    assert shown(row, "options", "answer") == (("Gloves.", "A film.", "An LED."), "B")


@pytest.mark.parametrize(
    ("problem", "answer", "problem_type", "kind"),
    [
        ("How many?", "3", "math", "math"),
        ("How many?", "3", "exact_match", "exact_match"),
        ("How many?", "3", None, "math"),
        ("Which?", "blue", None, "exact_match"),
        ("Which?\nA. red\nB. blue", "B", "math", "exact_match"),
    ],
)
def test_kinds_of_thinklite(read, problem, answer, problem_type, kind):
    """What the record says; with options a letter, which is no formula."""
    row = read(
        "thinklite-vl-hard", {**THINKLITE, "problem": problem, "ground_truth": answer, "problem_type": problem_type}
    )
    assert shown(row, "answer", "kind") == (answer, kind)


@pytest.mark.parametrize(
    ("answer", "kind", "label"),
    [
        ("\\boxed{\\frac{1}{2}}", "math", "\\frac{1}{2}"),
        ("so \\boxed{3} or \\boxed{4}", "math", "4"),
        ("\\boxed{Cartoonish}", "exact_match", "Cartoonish"),
        ("\\boxed{(C)}", "exact_match", "C"),
        ("12 cm", "math", "12 cm"),
    ],
)
def test_answers_of_virl(read, answer, kind, label):
    row = read("virl", {**VIRL, "question": "How?<image>", "answer": answer})
    assert shown(row, "question", "kind", "answer") == ("How?", kind, label)


def test_the_original_parquet_of_dapo(write):
    record = {
        "prompt": [{"role": "user", "content": f"{DAPO_BEFORE}{DAPO['prompt']}{DAPO_AFTER}"}],
        "reward_model": {"ground_truth": "4", "style": "rule"},
    }
    (row,), _ = read_rows(write([record], name="d.parquet"), format="dapo-math")
    assert shown(row, "question", "answer", "kind", "media") == ("What is $2 + 2$?", "4", "math", "")


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        (f"{DAPO_BEFORE}What?{DAPO_AFTER}", "What?"),
        ("<image>\nWhat?\nPut your final answer in \\boxed{}.", "What?"),
        ("In <image>, what?", "In , what?"),
        (
            "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
            "Question: What?",
            "What?",
        ),
        (
            "Locate the start and end timestamps of the video segment corresponding to the description: he runs. "
            "Please provide the start and end timestamps (in seconds, precise to one decimal places) in the format "
            "\\boxed{[start, end]}.",
            "he runs.",
        ),
        ("What is in the box?", "What is in the box?"),
        ("Hint: look left. What?", "Hint: look left. What?"),
        ("Please put your final answer aside. What?", "Please put your final answer aside. What?"),
        ("Question:", "Question:"),
    ],
)
def test_instructions_go_and_questions_stay(prompt, plain):
    assert plain_question(prompt) == plain


@pytest.mark.parametrize(
    ("question", "head", "options"),
    [
        ("Q?\nA. red\nB. blue", "Q?", ["red", "blue"]),
        ("Q?\nOptions:\nA) red\n\nB) blue\n", "Q?", ["red", "blue"]),
        ("Q?\nMore.\nChoices:\n(A) 1\n(B) 2\n(C) 3", "Q?\nMore.", ["1", "2", "3"]),
        ("Q? Choices: (A) 1 cm, (B) 2 cm", "Q?", ["1 cm", "2 cm"]),
        ("Q?\nOptions: A. a cat B. a dog C. Mr. B", "Q?", ["a cat", "a dog", "Mr. B"]),
        ("Q? (A) 1 (B) 2", None, []),  # nothing announces them
        ("Q?\nA. red\nC. blue", None, []),  # a gap
        ("Q?\nA. red\nB) blue", None, []),  # two styles
        ("Q?\nA. red\nB. blue\nor green", None, []),  # more behind them
        ("Q?\nA. red", None, []),
        ("A. red\nB. blue", None, []),  # no question
        ("Q?\nOptions:\nA.\nB. blue", None, []),
        ("Q? Options: (A) 1 (B) as in (A)", None, []),
        ("Q? Options: (A) (B) 2", None, []),
        ("Q? Options: (A) 1\nhint (B) 2", None, []),
    ],
)
def test_options_in_a_question(question, head, options):
    assert split_options(question) == (question if head is None else head, options)


def test_options_stay_where_the_answer_is_none_of_their_letters(read):
    row = read("virl", {**VIRL, "answer": "\\boxed{ABC}"})
    assert shown(row, "question", "options", "answer") == (
        "Which angle is larger?\nChoices:\n(A) ABC\n(B) BCD",
        (),
        "ABC",
    )
    twice = {**VIDEO_R1, "problem": "What does he do?\nA. run\nB. jump"}
    assert shown(read("video-r1", twice), "question", "options") == ("What does he do?", ("run", "jump"))
    second = {**VIDEO_R1, "problem": "What does he do?\nA. run\nB. swim"}
    assert shown(read("video-r1", second), "question", "options") == (second["problem"], ("run", "jump"))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("B", "B"), ("(B)", "B"), ("B.", "B"), (" blue ", "B"), ("B. blue", "B"), ("A. blue", "A. blue"), ("D", "D")],
)
def test_choices(answer, expected):
    assert choice(answer, ["red", "Blue", "green"]) == expected


def test_boxes():
    assert boxed("\\boxed{a{b}c} and \\boxed{ {x} }") == "{x}"
    assert boxed(" 4 ") == "4"
    assert boxed("\\boxed{4") == "\\boxed{4"


# What math-verify 0.9 finds anything in, and what not, in the bare answer.
FORMULAS = ["12", "-3", "3.5", "1/2", "\\frac{1}{2}", "2x+1", "$x$", "12 cm", "50%", "y=2x", "(1, 2)", "60^\\circ"]
FORMULAS += ["x > 3", "$5", "2π", "(3+4)", "x = 3", "\\(x+1\\)", "\\[y\\]", "about 3 apples", ".5", "10^{-3}"]
TEXTS = ["A", "red", "x", "x+1", "\\pi", "\\sqrt{3}", "{1,2}", "[3,4]", "B, C", "H2O", "\\text{blue}", "a/b", "√3"]
TEXTS += ["(1,2)", "\\frac{1}{x}", "\\$5", "five (5)", "-(2)", "x=y", "A-3"]


@pytest.mark.parametrize("answer", FORMULAS + TEXTS)
def test_formulas_are_what_the_grader_can_parse(answer):
    assert is_formula(answer) == (answer in FORMULAS)


def test_the_grader_agrees():
    parse = pytest.importorskip("math_verify").parse
    assert [answer for answer in FORMULAS + TEXTS if parse(answer, parsing_timeout=None)] == FORMULAS


def test_rows_are_what_the_prompt_takes(read):
    """No question keeps words that the prompt adds, and none keeps a placeholder."""
    from mlxvr.model.prompt import question_text

    for format, record in EXAMPLES.items():
        row = read(format, record)
        assert isinstance(row, Row)
        asked = question_text(row.text, list(row.options) or None, row.ask_kind)
        assert asked.count("boxed{") == (2 if row.kind == "gqa" else 1)
        assert "<image>" not in asked
        assert asked.count("A. ") <= 1
