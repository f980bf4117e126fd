r"""Rewards, against tables worked by hand from the method's rules.

In a table 1 and 0 are what an answer earns; totals are written as the sum that they are, so that each can be checked
with a pencil.
"""

import math
import random
import sys
import time
from itertools import product

import pytest

from mlxvr.data.rows import Row
from mlxvr.errors import ConfigError, DataError
from mlxvr.grading import math_equality
from mlxvr.grading.reward import Reward, Weights, answers, compare_answers, format_reward, load_reward, score

DECLINED = "Let's analyze the problem step by step."


def earned(answer, truth, kind="exact_match"):
    """R1 and R2 of an answer that is given twice; the two are read alike."""
    reward = score(f"\\boxed{{{answer}}}<think>r</think>\\boxed{{{answer}}}", truth, kind)
    assert reward.first == reward.second
    return reward.second


# ---- exact_match


@pytest.mark.parametrize("letter", "ABCDEFGH")
def test_letters(letter):
    forms = ["{}", "({})", "{})", "{}:", " {} ", "( {} )", "{} )", "[{}]", "{{{}}}", "({}):", "{};", "{}/", "{}-"]
    for form in [*forms, "\uff08{}\uff09"]:  # the last: fullwidth brackets, which NFKC makes plain
        for truth in ("{}", "({})", "{})", "{}:"):
            assert earned(form.format(letter), truth.format(letter)) == 1
            assert earned(form.format(letter.lower()), truth.format(letter)) == 1
            assert earned(form.format(letter), truth.format("Z")) == 0


@pytest.mark.parametrize(
    "form",
    ["{}.", "{}. red", "{}) red", "({}) red", "({}).", "{}: red", "{},", "({}", "**{}**", "\\text{{{}}}", "Option {}"],
)
def test_what_is_no_letter(form):
    """Unlike in evaluation, which reads these kindly."""
    assert earned(form.format("A"), "A") == 0


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("A. red", "A. red", 1),  # the same text is the same
        ("A.", "a.", 1),
        ("red", "RED", 1),
        ("The  Red\n\tcup", "the red cup", 1),
        ("  red ", "red", 1),
        ("red cup", "redcup", 0),
        ("red.", "red", 0),
        ("\uff52\uff45\uff44", "red", 1),  # fullwidth letters
        ("\ufb01ve", "five", 1),  # a ligature
        ("\uff11\uff12", "12", 1),
        ("cafe\u0301", "caf\u00e9", 1),  # an accent apart, and one with its letter
        ("cafe", "caf\u00e9", 0),
        ("red\u00a0cup", "red cup", 1),  # a space that does not break
        ("12", "12", 1),
        ("12.0", "12", 0),
        ("12", 12, 1),
        ("0.5", 0.5, 1),
        ("", "A", 0),
        ("AB", "A", 0),
    ],
)
def test_texts(answer, truth, right):
    assert earned(answer, truth) == right


YES, NO = ("yes", "true", "ok", "okay"), ("no", "false")


def test_booleans():
    for words, others in ((YES, NO), (NO, YES)):
        for answer, truth in product(words, words):
            for form in ("{}", "{}.", "{}!", '"{}"', " {} ", "**{}**", "({})"):
                assert earned(form.format(answer), truth) == earned(form.format(answer.upper()), truth) == 1
        for answer, truth in product(words, others):
            assert earned(answer, truth) == 0
    for answer, truth in (("yes, it is", "yes"), ("yess", "yes"), ("yes no", "yes"), ("nothing", "no"), ("1", "true")):
        assert earned(answer, truth) == 0


@pytest.mark.parametrize(("letter", "word"), [("y", "yes"), ("t", "true"), ("n", "no"), ("f", "false")])
def test_booleans_of_one_letter(letter, word):
    """Alone it is a letter, as an option may be; with other punctuation than a letter's it is the word."""
    assert earned(letter, letter.upper()) == 1
    assert earned(letter, word) == 0
    assert earned(f"'{letter}'", word) == earned(f"{letter}.", word) == 1


# ---- iou and gqa


@pytest.mark.parametrize("separator", [",", ", ", "-", " - ", "\u2013", " \u2013 ", "\u2014", " to ", " and "])
@pytest.mark.parametrize("brackets", ["[{}]", "({})", "{}", "from {} s"])
def test_intervals(separator, brackets):
    for ends in (("2.0", "4.5"), ("4.5", "2.0")):  # swapped ends are put in order
        assert earned(brackets.format(separator.join(ends)), [2.0, 7.0], "iou") == pytest.approx(2.5 / 5)


@pytest.mark.parametrize(
    ("answer", "truth", "iou"),
    [
        ("[2, 4]", [2, 4], 1),
        ("[2, 4]", [4, 2], 1),
        ("[2, 4]", [3, 5], 1 / 3),
        ("[2, 4]", [0, 10], 2 / 10),
        ("[0, 10]", [2, 4], 2 / 10),
        ("[2, 4]", [4, 6], 0),
        ("[2, 4]", [5, 6], 0),
        ("[3, 3]", [2, 4], 0),  # a point
        ("[3, 3]", [3, 3], 0),
        ("3", [2, 4], 0),  # no interval
        ("soon", [2, 4], 0),
        ("", [2, 4], 0),
        ("0:02 - 0:04", [2, 4], 0),  # a clock time is no time in seconds: this is 0 to 2 here, as in the public grader
        ("0:02 - 0:04", [0, 2], 1),
        ("2 to 4.", [2, 4], 0),  # and no interval stands bare before a full stop
        ("[2, 4] or [0, 10]", [0, 10], 2 / 10),  # the first
        ("at 1, so [2, 4].", [2, 4], 1),
        ("[2, 4]", [[10, 20], [3, 5], [2, 5]], 2 / 3),  # the best of 0, 1/3 and 2/3
        ("[2, 4]", "[10, 20], [2, 5]", 2 / 3),
        ("[2, 4]", "2 to 4", 1),
        ("start: 2, end: 4", [2, 4], 0),  # evaluation reads this
    ],
)
def test_iou(answer, truth, iou):
    assert earned(answer, truth, "iou") == pytest.approx(iou)


@pytest.mark.parametrize(
    ("answer", "sum_of_both"),
    [
        ("B <> [2.0, 4.0]", 1 + 1),
        ("B<>2 to 4", 1 + 1),
        ("(B) <> [3.0, 5.0]", 1 + 1 / 3),
        ("b <> [8, 9]", 1),
        ("B <> soon", 1),
        ("B <> [3, 3]", 1),
        ("B", 1),
        ("C <> [2, 4]", 1),
        ("B. red <> [2, 4]", 1),
        ("[2, 4]", 1),
        ("B [2, 4]", 1),  # without the mark both are read from the whole, and that is no letter
        ("B <> [0, 1] <> [2, 4]", 1 + 1),  # the first and the last part
        ("C <> [5, 6]", 0),
        ("", 0),
    ],
)
def test_grounded_answers(answer, sum_of_both):
    for truth in (
        "B <> [2.0, 4.0]",
        ["B", [[2.0, 4.0]]],
        ["B", [2, 4]],
        {"answer": "B", "segments": [[2, 4]]},
        {"answer": "B", "segment": [4, 2]},
    ):
        assert earned(answer, truth, "gqa") == pytest.approx(sum_of_both)


def test_grounded_answers_take_the_best_segment():
    assert earned("B <> [2, 4]", ["B", [[10, 20], [3, 5], [2, 5]]], "gqa") == pytest.approx(1 + 2 / 3)


# ---- math


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("1/2", "0.5", 1),
        (r"\frac{1}{2}", "0.5", 1),
        ("50%", "0.5", 1),
        ("1,000", "1000", 1),
        ("7", 7, 1),
        ("x+1", "$1+x$", 1),
        (r"2\sqrt{2}", r"$\sqrt{8}$", 1),
        (r"$2\sqrt{2}$", r"$\sqrt{8}$", 1),
        (r"\frac{\sqrt{3}}{2}", r"$\sqrt{\frac{3}{4}}$", 1),
        ("12 cm^2", "$12$", 1),  # a number in words, which as a formula would be a product
        ("5 m/s", r"$5\text{ m/s}$", 1),
        (r"\[7\]", "$x=7$", 1),
        (r"\(x+1\)", "$1+x$", 1),
        ("12 cm^2", "$13$", 0),
        ("x+2", "$1+x$", 0),
        ("3", "4", 0),
        ("", "0", 0),
        ("", "$0$", 0),
    ],
)
def test_formulas(answer, truth, right):
    pytest.importorskip("math_verify")
    assert earned(answer, truth, "math") == right


def test_math_asks_math_verify(monkeypatch):
    """How the question is put, wherever the package is: as it stands, and as a formula where the truth is one."""
    asked = []

    def are_equal(answer, truth):
        asked.append((answer, truth))
        return answer.startswith("$")

    monkeypatch.setattr(math_equality, "require", lambda: None)
    monkeypatch.setattr(math_equality, "are_equal", are_equal)
    completion = r"\boxed{2+6}<think>r</think>\boxed{$8$}"
    assert score(completion, "8", "math").total == pytest.approx(1.1 + 1.0)
    assert asked == [("2+6", "8"), ("$8$", "8")]
    asked.clear()
    assert score(completion, "$8$", "math").total == pytest.approx(3.0)
    assert asked == [("2+6", "$8$"), ("$2+6$", "$8$"), ("$8$", "$8$")]
    asked.clear()
    assert score("no box", "$8$", "math").total == 0
    assert asked == [], "an empty answer is not asked"


# ---- the two answers


@pytest.mark.parametrize(
    ("completion", "first", "second"),
    [
        (r"\boxed{A}<think>r</think>\boxed{B}", "A", "B"),
        (r"So \boxed{ A } then <think>r</think> hence \boxed{(B)}.", "A", "(B)"),
        (r"\boxed{A}\boxed{B}<think>r</think>\boxed{C}", "", "C"),  # exactly one box each
        (r"\boxed{A}<think>r</think>\boxed{B}\boxed{B}", "A", ""),
        (r"A<think>r</think>\boxed{B}", "", "B"),
        (r"\boxed{A}<think>r</think>B", "A", ""),
        (r"\boxed{A}<think>\boxed{C}</think>\boxed{B}", "A", "B"),  # what is boxed in the reasoning is not read
        (r"\boxed{A}<think>r<think>s</think>\boxed{B}", "A", "B"),  # before the first, after the last
        (r"\boxed{A}<think>r</think>\boxed{C}</think>\boxed{B}", "A", "B"),
        (r"\boxed{A}<think>r</think>\boxed{C}<think>s</think>\boxed{B}", "A", "B"),
        (r"\boxed{A}<think>r</think>", "A", ""),
        (r"<think>r</think>\boxed{B}", "", "B"),
        (r"\boxed{A}<think>r, cut off", "A", "A"),  # a tag that is missing cuts nothing off
        (r"\boxed{A}<think>r \boxed{B}", "A", ""),
        (r"\boxed{A}", "A", "A"),
        (r"\boxed{A}\boxed{B}", "", ""),
        (r"\boxed{A<think>r</think>\boxed{B}", "", "B"),  # a box that never closes is none
        (r"\boxed{A}<think>r</think>\boxed{B", "A", ""),
        (r"\boxed{\frac{1}{2}}<think>r</think>\boxed{\frac{\sqrt{3}}{2}}", r"\frac{1}{2}", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed{\boxed{A}}<think>r</think>\boxed{{B}}", r"\boxed{A}", "{B}"),
        (r"}\boxed{A}{<think>r</think>}{\boxed{B}}", "A", "B"),
        (r"\boxed{}<think>r</think>\boxed{ }", "", ""),
        (r"\boxed {A}<think>r</think>\fbox{B}", "", ""),
        (r"\boxed{A}<Think>r</Think>\boxed{B}", "", ""),  # no tags, and so two boxes in one text
        ("", "", ""),
    ],
)
def test_answers(completion, first, second):
    assert answers(completion) == (first, second)
    for truth in "AB":
        reward = score(completion, truth)
        assert reward.first == (first.strip("(){}") == truth)
        assert reward.second == (second.strip("(){}") == truth)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (r"\boxed{A}<think>r</think>\boxed{B}", 1),
        (" \n\\boxed{A}\t\n<think>\nr\n</think>\n\n\\boxed{B}\n ", 1),
        (r"\boxed{Let's analyze the problem step by step.}<think>r</think>\boxed{[1, 2]}", 1),
        (r"\boxed{A}<think>\boxed{C}</think>\boxed{B}", 1),
        (r"\boxed{\frac{1}{2}}<think>r</think>\boxed{\frac{\sqrt{3}}{2}}", 1),
        (r"\boxed{A}<think></think>\boxed{B}", 0),  # nothing was thought
        ("\\boxed{A}<think> \n</think>\\boxed{B}", 0),
        (r"So \boxed{A}<think>r</think>\boxed{B}", 0),
        (r"\boxed{A}.<think>r</think>\boxed{B}", 0),
        (r"\boxed{A}<think>r</think>So \boxed{B}", 0),
        (r"\boxed{A}<think>r</think>\boxed{B}.", 0),
        (r"\boxed{A}<think>r</think>\boxed{B}<|im_end|>", 0),
        (r"\boxed{A}\boxed{A}<think>r</think>\boxed{B}", 0),
        (r"\boxed{A}<think>r</think>\boxed{B}\boxed{B}", 0),
        (r"\boxed{A}<think>r</think><think>r</think>\boxed{B}", 0),
        (r"\boxed{A}<think>r<think>s</think></think>\boxed{B}", 0),
        (r"\boxed{A}<think>r<think>s</think>\boxed{B}", 0),
        (r"\boxed{A}<think>r</think>\boxed{B</think>}", 0),
        (r"\boxed{A</think>}<think>r</think>\boxed{B}", 0),
        (r"\boxed{A}<think>r</think>\boxed{B}</think>", 0),
        (r"\boxed{A}</think>r<think>\boxed{B}", 0),
        (r"<think>r</think>\boxed{B}", 0),
        (r"\boxed{A}<think>r</think>", 0),
        (r"\boxed{A}<think>r</think>\boxed{B", 0),
        (r"\boxed{A}<think>r\boxed{B}", 0),
        (r"\boxed{A}\boxed{B}", 0),
        (r"\boxed{A}", 0),
        (r"\boxed{A}<THINK>r</THINK>\boxed{B}", 0),
        ("", 0),
    ],
)
def test_format(completion, right):
    assert format_reward(completion) == score(completion, "A").format == right


# ---- declining to answer directly


@pytest.mark.parametrize(
    ("first", "second", "truth", "kind", "fallback"),
    [
        (DECLINED, "B", "B", "exact_match", 1),
        ("Let's analyze", "B", "B", "exact_match", 1),
        (" Let's analyze it.", "B", "B", "exact_match", 1),
        (DECLINED, "A", "B", "exact_match", 0),  # R2 is 0
        ("B", "B", "B", "exact_match", 0),  # did not decline
        ("let's analyze", "B", "B", "exact_match", 0),
        ("Lets analyze", "B", "B", "exact_match", 0),
        ("First: Let's analyze", "B", "B", "exact_match", 0),
        (DECLINED, "[0, 8]", [0, 10], "iou", 1),  # 0.8
        (DECLINED, "[0, 7]", [0, 10], "iou", 0),  # 0.7 is not above 0.7
        (DECLINED, "[0, 5]", [0, 10], "iou", 0),
        (DECLINED, "B <> [20, 30]", "B <> [0, 10]", "gqa", 1),  # 1 + 0
        (DECLINED, "A <> [0, 8]", "B <> [0, 10]", "gqa", 1),  # 0 + 0.8
        (DECLINED, "A <> [0, 5]", "B <> [0, 10]", "gqa", 0),
    ],
)
def test_fallback(first, second, truth, kind, fallback):
    reward = score(f"\\boxed{{{first}}}<think>r</think>\\boxed{{{second}}}", truth, kind)
    assert reward.fallback == fallback
    assert reward.format == 1


def test_declining_in_two_boxes_is_no_answer():
    assert score(rf"\boxed{{{DECLINED}}}\boxed{{A}}<think>r</think>\boxed{{B}}", "B").fallback == 0


# ---- the total


@pytest.mark.parametrize(
    ("completion", "truth", "kind", "total"),
    [
        (r"\boxed{B}<think>r</think>\boxed{B}", "B", "exact_match", 0.9 + 1.1 + 1.0),
        (r"\boxed{A}<think>r</think>\boxed{B}", "B", "exact_match", 1.1 + 1.0),
        (r"\boxed{B}<think>r</think>\boxed{A}", "B", "exact_match", 0.9 + 1.0),
        (r"\boxed{A}<think>r</think>\boxed{A}", "B", "exact_match", 1.0),
        (rf"\boxed{{{DECLINED}}}<think>r</think>\boxed{{B}}", "B", "exact_match", 1.1 + 1.0 + 0.3),
        (rf"\boxed{{{DECLINED}}}<think>r</think>\boxed{{A}}", "B", "exact_match", 1.0),
        (rf"\boxed{{{DECLINED}}}<think>r</think>So \boxed{{B}}", "B", "exact_match", 1.1 + 0.3),
        (r"\boxed{B}<think></think>\boxed{B}", "B", "exact_match", 0.9 + 1.1),
        (r"\boxed{B}", "B", "exact_match", 0.9 + 1.1),
        ("B", "B", "exact_match", 0.0),
        (r"\boxed{[0, 5]}<think>r</think>\boxed{[0, 8]}", [0, 10], "iou", 0.9 * 0.5 + 1.1 * 0.8 + 1.0),
        (rf"\boxed{{{DECLINED}}}<think>r</think>\boxed{{[0, 8]}}", [0, 10], "iou", 1.1 * 0.8 + 1.0 + 0.3),
        (r"\boxed{A <> [0, 5]}<think>r</think>\boxed{B <> [0, 8]}", "B <> [0, 10]", "gqa", 0.9 * 0.5 + 1.1 * 1.8 + 1.0),
    ],
)
def test_total(completion, truth, kind, total):
    reward = score(completion, truth, kind)
    assert reward.total == pytest.approx(total, abs=1e-12)
    weighted = score(completion, truth, kind, weights=Weights(first=1, second=10, format=100, fallback=1000))
    parts = 1 * reward.first + 10 * reward.second + 100 * reward.format + 1000 * reward.fallback
    assert weighted.total == pytest.approx(parts, abs=1e-9)
    none = score(completion, truth, kind, weights=Weights(first=0, second=0, format=0, fallback=0))
    assert none.total == 0
    assert (reward.first, reward.second, reward.format, reward.fallback) == (
        none.first,
        none.second,
        none.format,
        none.fallback,
    ), "weights change the total alone"


def test_weights_of_the_paper():
    assert Weights() == Weights(first=0.9, second=1.1, format=1.0, fallback=0.3)
    completion = rf"\boxed{{{DECLINED}}}<think>r</think>\boxed{{B}}"
    assert score(completion, "B") == Reward(
        total=pytest.approx(2.4), first=0.0, second=1.0, format=1.0, fallback=1.0
    )  # 1.1 (1 + 0.3 / 1.1) + 1.0, as the public code adds it up
    assert score(completion, "B", weights=Weights(fallback=-1)).total == pytest.approx(1.1)


@pytest.mark.parametrize("name", ["first", "second", "format", "fallback"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None, True])
def test_weights_that_are_no_numbers(name, value):
    with pytest.raises(ConfigError, match=f"the weight of the reward's part {name} is .*: give a number"):
        Weights(**{name: value})


# ---- truths


@pytest.mark.parametrize(
    ("truth", "kind", "message"),
    [
        (None, "exact_match", "expected a letter, a text or a number"),
        ("", "exact_match", "cannot be compared"),
        (" ", "exact_match", "cannot be compared"),
        (["A"], "exact_match", "cannot be compared"),
        (True, "exact_match", "cannot be compared"),
        (None, "math", "cannot be compared"),
        ([1, 2], "math", "cannot be compared"),
        (None, "iou", "holds no segment"),
        ("A", "iou", "holds no segment"),
        ([], "iou", "holds no segment"),
        ([1], "iou", "holds no segment"),
        ([[1, 2], [3]], "iou", "holds no segment"),
        ([1, math.nan], "iou", "holds no segment"),
        ({"segments": [[1, 2]]}, "iou", "holds no segment"),
        (None, "gqa", "expected 'answer <> "),
        ("A", "gqa", "expected 'answer <> "),
        (["A"], "gqa", "expected 'answer <> "),
        ({"segments": [[1, 2]]}, "gqa", "expected 'answer <> "),
        ("A <> soon", "gqa", "holds no segment"),
        (" <> [1, 2]", "gqa", "cannot be compared"),
        ({"answer": "A"}, "gqa", "holds no segment"),
        (["A", None], "gqa", "holds no segment"),
        ("A", "qa", "kind 'qa' has no reward"),
    ],
)
def test_truths_of_another_form(truth, kind, message):
    """Refused whatever was answered, so that a wrong row is found at once."""
    for completion in ("", r"\boxed{A}<think>r</think>\boxed{A}"):
        with pytest.raises(DataError, match=message):
            score(completion, truth, kind)


# ---- agreement


@pytest.mark.parametrize(
    ("first", "second", "kind", "far"),
    [
        ("A", "(a)", "exact_match", 1),
        ("A", "B", "exact_match", 0),
        ("A.", "A", "exact_match", 0),
        ("Yes.", "true", "exact_match", 1),
        ("red  cup", "Red cup", "exact_match", 1),
        ("[2, 4]", "3 to 5", "iou", 1 / 3),
        ("[2, 4]", "[2.0, 4.0]", "iou", 1),
        ("[3, 3]", "[3, 3]", "iou", 0),
        ("[2, 4]", "soon", "iou", 0),
        ("soon", "soon", "iou", 0),
        ("B <> [2, 4]", "(B) <> [3, 5]", "gqa", (1 + 1 / 3) / 2),
        ("B <> [2, 4]", "C <> [2, 4]", "gqa", 1 / 2),
        ("B <> [2, 4]", "B", "gqa", 1 / 2),
        ("B <> [2, 4]", "C <> [5, 6]", "gqa", 0),
        ("x + 1", "X  + 1", "math", 1),  # the same text, with or without the package
    ],
)
def test_agreement(first, second, kind, far):
    assert compare_answers(first, second, kind) == compare_answers(second, first, kind) == pytest.approx(far)


@pytest.mark.parametrize("kind", ["exact_match", "math", "iou", "gqa"])
@pytest.mark.parametrize("nothing", ["", " \n", DECLINED, f" {DECLINED}"])
def test_nothing_agrees_with_nothing(kind, nothing):
    for second in (nothing, "A", "[1, 2]"):
        assert compare_answers(nothing, second, kind) == compare_answers(second, nothing, kind) == 0


@pytest.mark.parametrize(
    ("first", "second", "far"),
    [("1/2", "0.5", 1), ("3", "4", 0), ("x+1", "$1+x$", 1), ("$x+1$", "$1+x$", 1), ("$x+1$", "$x+2$", 0)],
)
def test_formulas_agree(first, second, far):
    pytest.importorskip("math_verify")
    assert compare_answers(first, second, "math") == compare_answers(second, first, "math") == far


def test_agreement_raises_as_score(monkeypatch):
    with pytest.raises(DataError, match="kind 'qa' has no reward"):
        compare_answers("A", "B", "qa")
    monkeypatch.setattr(math_equality, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="math-verify"):
        compare_answers("x+1", "1+x", "math")


# ---- any text


def test_any_completion_has_a_reward():
    """No completion, however broken, raises; parts stay in their ranges and add up."""
    rng = random.Random(0)
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
        "Let's analyze",
        "\0",
        " ",
        "9" * 400,
    ]
    for _ in range(2000):
        completion = "".join(rng.choices(pieces, k=rng.randrange(12)))
        for kind, truth, most in (("exact_match", "A", 1), ("iou", [1, 2], 1), ("gqa", "A <> [1, 2]", 2)):
            reward = score(completion, truth, kind)
            assert 0 <= reward.first <= most
            assert 0 <= reward.second <= most
            assert {reward.format, reward.fallback} <= {0.0, 1.0}
            total = 0.9 * reward.first + 1.1 * reward.second + reward.format + 0.3 * reward.fallback
            assert reward.total == pytest.approx(total)


@pytest.mark.parametrize(
    "text", ["\\boxed{", "{", "}", "\\boxed{}", "<think>", "</think>", "\\boxed{{", "1 ", "[1,", "1:"]
)
def test_long_completions_are_read_in_one_pass(text):
    begin = time.perf_counter()
    score(text * 50_000, [1, 2], "iou")
    score(f"\\boxed{{{text * 5_000}}}", [1, 2], "iou")
    assert time.perf_counter() - begin < 5


# ---- the user's own


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with modules of rewards, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("own_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


ROW = Row(id="a", question="Which cup?", answer="A")


def test_a_function_of_a_module(own):
    (own / "own_length.py").write_text(
        "def by_length(completion, row):\n    return len(completion) / len(row.question)\n"
        "class Judge:\n    @staticmethod\n    def zero(completion, row):\n        return 0.0\n"
    )
    assert load_reward("own_length:by_length")("Which", ROW) == 0.5
    assert load_reward("own_length:Judge.zero")("Which", ROW) == 0


def test_a_module_that_is_installed(own):
    assert load_reward("mlxvr.grading.reward:format_reward") is format_reward


def test_entry_points(own):
    """A distribution as pip leaves it."""
    info = own / "own_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mlxvr.rewards]\nbrief = own_brief:brief\nbroken = own_brief:none\n")
    (own / "own_brief.py").write_text("def brief(completion, row):\n    return -len(completion)\n")
    sys.path.insert(0, str(own))
    assert load_reward("brief")("abc", ROW) == -3
    with pytest.raises(ConfigError, match="reward 'broken' cannot be loaded"):
        load_reward("broken")
    with pytest.raises(ConfigError, match=r"reward 'short' is unknown.*of mlxvr.rewards \(.*brief, broken"):
        load_reward("short")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("length", "reward 'length' is unknown: give module:function, or an entry point of mlxvr.rewards"),
        ("", "reward '' is unknown"),
        ("own_nowhere:f", r"cannot be loaded \(ModuleNotFoundError: No module named 'own_nowhere'\)"),
        ("own_failing:f", r"cannot be loaded \(RuntimeError: no luck today\)"),
        ("own_syntax:f", r"cannot be loaded \(SyntaxError"),
        ("own_fine:g", r"cannot be loaded \(AttributeError"),
        ("own_fine:", "cannot be loaded"),
        (":f", "cannot be loaded"),
        ("own_fine:number", "reward 'own_fine:number' is of type int: give a function"),
    ],
)
def test_rewards_that_cannot_be_loaded(own, name, message):
    (own / "own_failing.py").write_text("raise RuntimeError('no luck\\ntoday')\n")
    (own / "own_syntax.py").write_text("def f(\n")
    (own / "own_fine.py").write_text("number = 3\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_reward(name)
    assert "\n" not in str(caught.value)
