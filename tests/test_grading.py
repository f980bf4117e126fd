r"""Grades, worked by hand, and against the rules that the public graders state, written down anew."""

import itertools
import random
import re
import threading

import pytest

from mlxvr.errors import DataError
from mlxvr.grading import math_equality
from mlxvr.grading.lenient import Grade, final_answer, grade, grade_parts

OPTIONS = ("red", "A black dog", "Dr. Who", "12")
LETTER_FORMS = [
    *["{}", " {} ", "({})", "( {} )", "{}.", "{})", "{}:", "({}).", "{}. red", "{}) red", "({}) red", "{}: blue"],
    *["{} - red", "\\text{{{}}}", "\\textbf{{({})}}", "\\mathrm{{{}}}", "**{}**", "${}$", "[{}]", "{{{}}}"],
    *["The answer is {}", "the answer is {}.", "Answer: {}", "The correct answer is ({}).", "Option {}"],
    *["The best answer is: {}", "My choice is {}", "{}\n", "I would say {}", "{} <> [1.0, 2.0]", "Answer: **{}**"],
]


@pytest.mark.parametrize("form", LETTER_FORMS)
@pytest.mark.parametrize("letter", "ABCD")
def test_letters(form, letter):
    answer = form.format(letter)
    assert [grade("exact_match", answer, right, OPTIONS) for right in "ABCD"] == [float(x == letter) for x in "ABCD"]
    assert grade("exact_match", f"\\boxed{{{answer}}}", letter, OPTIONS) == 1
    assert grade("exact_match", answer, letter) == 1, "where the options stand in the question"


@pytest.mark.parametrize("form", ["{}", "({})", "{}.", "{})", "({}) red"])
def test_lower_case_letters(form):
    assert grade("exact_match", form.format("c"), "C", OPTIONS) == 1
    assert grade("exact_match", form.format("c"), "A", OPTIONS) == 0


def video_mme(text):
    """The first capital that is a letter, after the stock phrases are gone."""
    for phrase in ("The best answer is", "The correct answer is", "The answer is", "The answer"):
        text = text.replace(phrase, "")
    match = re.search("[ABCD]", text)
    return match and match.group()


def mvbench(text):
    """The letter before a stop, else the first that stands alone."""
    match = re.match(r"([A-E])\.\s*(.+)$", text.strip(), re.IGNORECASE) or re.search(
        r"\b([A-E])\b", text, re.IGNORECASE
    )
    return match and match.group(1).upper()


def test_public_graders_agree_on_the_usual_forms():
    """The four forms, with texts that hold no capital."""
    for letter, form, text in itertools.product("ABCD", ["{0}", "({0})", "{0}.", "{0}. {1}"], ["red", "to run off"]):
        answer = form.format(letter, text)
        assert video_mme(answer) == mvbench(answer) == letter
        for right in "ABCD":
            assert grade("exact_match", answer, right, ("red", "to run off", "blue", "x")) == (right == letter)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("red", "A"),
        ("RED.", "A"),
        ('"red"', "A"),
        ("A black dog", "B"),  # the text of an option comes before the article
        ("a black  dog", "B"),
        ("A. black", "A"),
        ("Dr. Who", "C"),
        ("12", "D"),
        ("B. red", "B"),  # letter and text disagree: the letter
        ("B because A is blue", "B"),
        ("Not A. The answer is C", "C"),
        ("Answer: A. No, the answer is D.", "D"),
        ("B? Answer: D", "D"),
        ("Black dog", None),  # no letter within a word
        ("Before", None),
        ("E", None),
        ("X-ray", None),
        ("green", None),
        ("", None),
        ("Let's analyze the problem step by step.", None),
        ("Let's analyze: is it A?", None),
        ("The answer isn't clear", None),
    ],
)
def test_choices(answer, letter):
    assert [grade("exact_match", answer, right, OPTIONS) for right in "ABCD"] == [float(x == letter) for x in "ABCD"]


@pytest.mark.parametrize("truth", ["B", "b", "(B)", "B.", "B. A black dog", "A black dog", "a black dog."])
def test_ground_truth_of_a_choice(truth):
    assert grade("exact_match", "B", truth, OPTIONS) == 1
    assert grade("exact_match", "a black dog", truth, OPTIONS) == 1
    assert grade("exact_match", "A", truth, OPTIONS) == 0


def test_options_with_their_letters():
    options = ("A. Red.", "B. Blue.", "C. B.")
    assert [grade("exact_match", answer, "B", options) for answer in ("Blue", "B. Blue.", "B", "A. Red.")] == [
        1,
        1,
        1,
        0,
    ]


def test_options_that_are_letters():
    assert grade("exact_match", "A", "A", ("B", "A")) == 1
    assert grade("exact_match", "B", "A", ("B", "A")) == 0


def test_options_that_look_like_a_letter_and_text():
    assert grade("exact_match", "A. Smith", "B", ("B. Jones", "A. Smith")) == 1
    assert grade("exact_match", "A. Jones", "A", ("B. Jones", "A. Smith")) == 1


def test_options_of_one_text_name_no_choice():
    assert grade("exact_match", "red", "A", ("red", "red")) == 0


def test_many_options():
    options = [f"option {number}" for number in range(26)]
    assert grade("exact_match", "Z", "Z", options) == 1
    assert grade("exact_match", "I", "I", options) == 1
    assert grade("exact_match", "It is I.", "I", options) == 1


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("I think C", "C"),
        ("I think it is option C", "C"),
        ("I'd say B", "B"),
        ("I\u2019m sure that it is D.", "D"),
        ("Answer: I think C", "C"),
        ("The answer I believe is E", "E"),
        ("I would go with (F)", "F"),
        ("I can't tell", None),
        ("I", "I"),
        ("(I)", "I"),
        ("I.", "I"),
        ("I. the last one", "I"),
        ("The answer is I", "I"),
        ("Option I", "I"),
        ("I is right", "I"),
        ("I because it stops", "I"),
        ("A man leaves, so C", "C"),
        ("A man leaves", None),
        ("A is right", "A"),
        ("A because it stops", "A"),
        ("A would fit", "A"),
        ("A, since a man leaves", "A"),
        ("Option A shows it", "A"),
        ("In a box: B", "B"),
        ("a C", "C"),
        ("An X-ray of the E-mail, so D", "D"),
        ("the T-shirt", None),
        ("B - a T-shirt", "B"),
    ],
)
def test_words_of_one_letter_are_no_choices(answer, letter):
    """With nine options the I of "I think" is the letter of one of them; public patterns take it, and every article."""
    options = [f"thing {number}" for number in range(9)]
    right = [x for x in "ABCDEFGHI" if grade("exact_match", answer, x, options)]
    assert right == ([letter] if letter else [])


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (r"\boxed{A}<think>r</think>\boxed{B}", "B"),
        (r"\boxed{A}<think>r</think>\boxed{C} or \boxed{B}", "B"),
        (r"\boxed{A}<think>r", "A"),
        (r"\boxed{A}<think>\boxed{C} and \boxed{B}", "B"),
        (r"\boxed{A}<think>\boxed{C}</think>", "C"),
        (r"\boxed{A}<think>r</think>so it is D", "A"),
        (r"<think>A or B</think> D ", "D"),
        ("D", "D"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{A", "A"),
        ("", ""),
        ("D<|im_end|>", "D"),
    ],
)
def test_final_answers(output, answer):
    """The final box, else the last box, else the text."""
    assert final_answer(output) == answer


@pytest.mark.parametrize(
    ("kind", "answer", "truth", "right"),
    [
        ("exact_match", "Yes", "yes", 1),
        ("exact_match", "Yes, it is.", "yes", 1),
        ("exact_match", "true", "Yes", 1),
        ("exact_match", "y", "ok", 1),
        ("exact_match", "no", "yes", 0),
        ("exact_match", "No. It fell.", "f", 1),
        ("exact_match", "nothing", "no", 0),
        ("exact_match", "yesterday", "yes", 0),
        ("exact_match", "42", "42", 1),
        ("exact_match", "42.0", "42", 1),
        ("exact_match", "1,000", "1000", 1),
        ("exact_match", "1000.4", "1000", 0),
        ("exact_match", "-3", "3", 0),
        ("exact_match", "4 2", "42", 0),
        ("exact_match", "The  Red\ncup.", "the red cup", 1),
        ("exact_match", "ｒｅｄ", "red", 1),
        ("exact_match", "red cup", "red", 0),
        ("exact_match", "1/2", "0.5", 0),
        ("exact_match", "", "red", 0),
        ("exact_match", "Paris", ["London", "paris"], 1),
        ("exact_match", "Rome", ["London", "Paris"], 0),
        ("math", "1/2", "0.5", 1),
        ("math", r"\frac{1}{2}", "1/2", 1),
        ("math", r"\dfrac12", "0.5", 1),
        ("math", r"-\frac{3}{4}", "-0.75", 1),
        ("math", "50%", "0.5", 1),
        ("math", r"50\%", "50", 1),
        ("math", "$ 1{,}5 $", "15", 0),
        ("math", r"x + 1", "x+1", 1),
        ("math", r"\left( 1, 2 \right)", "(1,2)", 1),
        ("math", "1e3", "1000", 1),
        ("math", "1000.4", "1000", 0),
        ("math", "1.0000001", "1", 1),
        ("math", "1.001", "1", 0),
        ("math", "1/0", "1", 0),
        ("math", "3", "4", 0),
    ],
)
def test_free_answers(kind, answer, truth, right, monkeypatch):
    monkeypatch.setattr(math_equality, "is_available", lambda: False)
    assert grade(kind, answer, truth) == right
    assert grade(kind, f"\\boxed{{0}}<think>r</think>\\boxed{{{answer}}}", truth) == right


def test_math_questions_may_have_options():
    assert grade("math", "B", "B", ("1", "2")) == 1
    assert grade("math", "2", "B", ("1", "2")) == 1
    assert grade("math", "1", "B", ("1", "2")) == 0


@pytest.mark.parametrize(
    ("answer", "truth", "right"), [("x+1", "1+x", 1), ("x+1", "x+2", 0), (r"\sqrt{8}", r"2\sqrt{2}", 1)]
)
def test_math_verify(answer, truth, right):
    """With the package, in the main thread and beside it."""
    pytest.importorskip("math_verify")
    assert grade("math", answer, truth) == right
    grades = []
    thread = threading.Thread(target=lambda: grades.append(grade("math", answer, truth)))
    thread.start()
    thread.join()
    assert grades == [right]


def test_math_verify_is_asked_last(monkeypatch):
    asked = []

    def are_equal(answer, truth):
        asked.append((answer, truth))
        return (answer, truth) == ("$x+1$", "$1+x$")

    monkeypatch.setattr(math_equality, "is_available", lambda: True)
    monkeypatch.setattr(math_equality, "are_equal", are_equal)
    assert grade("math", "0.5", "1/2") == 1
    assert asked == []
    assert grade("math", "x+1", "1+x") == 1
    assert asked == [("$x+1$", "$1+x$")]
    assert grade("math", "x+2", "1+x") == 0
    assert grade("exact_match", "x+1", "1+x") == 0, "only mathematics is verified"
    assert len(asked) == 2


def test_math_verify_is_optional(monkeypatch):
    monkeypatch.setattr(math_equality, "is_available", lambda: False)
    assert grade("math", "x+1", "1+x") == 0
    assert grade("math", "1 + x", "1+x") == 1


@pytest.mark.parametrize(
    ("answer", "iou"),
    [
        ("[20.3, 30.8]", 1),
        ("20.3 to 30.8", 1),
        ("[30.8, 20.3]", 1),
        ("It starts at 20.3 and ends at 30.8.", 1),
        ('{"start_time": 20.3, "end_time": 30.8}', 1),
        ("start: 20.3, end: 30.8", 1),
        ("[20.3s, 30.8s]", 1),
        ("20.3s - 30.8s", 1),
        ("[20.3, 41.3]", 0.5),
        ("20.3 seconds", 0),
        ("none", 0),
    ],
)
def test_intervals_are_read_kindly(answer, iou):
    assert grade("iou", answer, [20.3, 30.8]) == pytest.approx(iou)


def test_the_best_segment_counts():
    segments = [[0.0, 5.0], [20.0, 30.0], [24.0, 26.0]]
    assert grade_parts("iou", "[20.0, 25.0]", segments) == Grade(iou=0.5, iop=1.0)
    assert grade_parts("iou", "[18.0, 22.0]", [[20, 30]]) == Grade(iou=pytest.approx(2 / 12), iop=0.5)
    assert grade_parts("iou", "[4.0, 4.0]", segments) == Grade(iou=0.0, iop=0.0)
    assert grade("iou", "no idea", segments) == 0
    assert grade("iou", None, segments) == 0


@pytest.mark.parametrize(
    ("answer", "accuracy", "iou", "iop", "score"),
    [
        ("B <> [20.0, 30.0]", 1, 1, 1, 1),
        ("(B) <> [25.0, 35.0]", 1, 1 / 3, 0.5, 2 / 3),
        ("A <> [20.0, 30.0]", 0, 1, 1, 0.5),
        ("A <> [40.0, 50.0]", 0, 0, 0, 0),
        ("B", 1, 0, 0, 0.5),
        ("a black dog <> 20 to 30", 1, 1, 1, 1),
        ("B [20.0, 30.0]", 1, 1, 1, 1),  # without the mark both are read from the whole
        ("", 0, 0, 0, 0),
    ],
)
def test_grounded_answers(answer, accuracy, iou, iop, score):
    for truth in ("B <> [20.0, 30.0]", ["B", [[0, 1], [20.0, 30.0]]], ["A black dog", [20, 30]]):
        got = grade_parts("gqa", answer, truth, OPTIONS)
        assert (got.accuracy, got.iou, got.iop) == pytest.approx((accuracy, iou, iop))
        assert got.score == grade("gqa", answer, truth, OPTIONS) == pytest.approx(score)


@pytest.mark.parametrize(
    ("graded", "right"),
    [
        (Grade(accuracy=1.0), True),
        (Grade(accuracy=0.0), False),
        (Grade(iou=0.5), True),
        (Grade(iou=0.49), False),
        (Grade(accuracy=1.0, iou=0.5, iop=1.0), True),
        (Grade(accuracy=1.0, iou=0.4, iop=1.0), False),
        (Grade(accuracy=0.0, iou=1.0, iop=1.0), False),
    ],
)
def test_right_or_wrong(graded, right):
    assert graded.is_right is right


@pytest.mark.parametrize(
    ("kind", "answer", "message"),
    [
        ("exact_match", None, "cannot be graded; expected a letter"),
        ("exact_match", [], "cannot be graded"),
        ("math", [[1, 2]], "cannot be graded"),
        ("gqa", "A", "expected 'answer <> "),
        ("gqa", "A <> soon", "holds no segment"),
        ("qa", "A", "kind 'qa' cannot be graded"),
    ],
)
def test_ground_truths_of_another_form(kind, answer, message):
    with pytest.raises(DataError, match=message):
        grade(kind, "A", answer)


def test_any_text_has_a_grade():
    """No output, however broken, is more than wrong; and every grade is in [0, 1]."""
    rng = random.Random(1)
    pieces = [
        "\\boxed{",
        "}",
        "{",
        "<think>",
        "</think>",
        "A",
        "(B)",
        "[1, 2]",
        "<>",
        "1/2",
        "%",
        "\\frac",
        "$",
        "**",
        " ",
    ]
    truths = {"exact_match": "A", "math": "1/2", "iou": [1, 2], "gqa": "A <> [1, 2]"}
    for _ in range(1500):
        text = "".join(rng.choices(pieces, k=rng.randrange(9)))
        for kind, truth in truths.items():
            assert 0 <= grade(kind, text, truth, rng.choice([(), OPTIONS])) <= 1
