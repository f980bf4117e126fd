"""Intervals: how they are read, worked by hand, and how far two of them overlap, counted second by second."""

import math
import random

import pytest

from mlxvr.errors import DataError
from mlxvr.grading.intervals import best_iou, find_interval, find_named_interval, is_point, segments_of, temporal_iou

SEPARATORS = [",", ", ", " , ", "-", " - ", "\u2013", " \u2013 ", "\u2014", " \u2014 ", " to ", " TO ", " and ", ",\n"]


@pytest.mark.parametrize("brackets", ["{}", "[{}]", "({})", "[ {} ]", "( {} )", "it is {} s", "{{{}}}"])
@pytest.mark.parametrize("separator", SEPARATORS)
def test_separators_and_brackets(separator, brackets):
    for find in (find_interval, find_named_interval):
        assert find(brackets.format(f"20.3{separator}30.8")) == (20.3, 30.8)
        assert find(brackets.format(f"30.8{separator}20.3")) == (20.3, 30.8), "swapped ends are put in order"
        assert find(brackets.format(f"3{separator}30")) == (3, 30)


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("[20.3, 30.8]", (20.3, 30.8)),
        ("(20.3 - 30.8)", (20.3, 30.8)),
        ("from 20.3 to 30.8 seconds", (20.3, 30.8)),
        ("between 20.3 and 30.8", (20.3, 30.8)),
        ("[5, 5]", (5, 5)),
        ("[1, 2] and [3, 4]", (1, 2)),
        ("[1, 2), 3", (1, 2)),  # brackets that do not match are none
        ("at 7, then [3, 4]", (3, 4)),
        ("from 1 to 2 to 3", (1, 2)),
        ("0.0-0.5", (0, 0.5)),
        ("It is [20.3, 30.8].", (20.3, 30.8)),
        ("Answer:20.3-30.8", (20.3, 30.8)),
        ("20.3 seconds", None),
        ("20.3 30.8", None),
        ("20.3; 30.8", None),
        ("20.3, -30.8", None),
        ("20.3 through 30.8", None),
        ("20.3 tonnes 30.8", None),
        ("1.2.3, 4", None),
        ("1, 2.3.4", None),
        ("none", None),
        ("", None),
    ],
)
def test_intervals(text, interval):
    assert find_interval(text) == interval
    assert find_named_interval(text) == interval


@pytest.mark.parametrize(
    ("text", "strict", "meant"),
    [
        ("From 20.3 to 30.8.", None, (20.3, 30.8)),  # the public reward holds the stop for a decimal point
        ("5 to 10.", None, (5, 10)),
        ("2 to 4. Or 6 to 8 s", (6, 8), (2, 4)),
        ("1:23 - 1:45", (1, 23), None),  # .. and clock times for seconds
        ("[1:23, 1:45]", (1, 23), None),
        ("0:20 to 30", (20, 30), None),
        ("20 to 0:30", (0, 20), None),
        ("[3.0s, 4.0s]", None, (3, 4)),
        ("[3.0 s, 4.0]", None, (3, 4)),
        ("(3.0 sec, 4.0 sec)", None, (3, 4)),
        ("3.0s - 4.0s", None, (3, 4)),
        ("3.0s-4.0s.", None, (3, 4)),
        ("3s to 4", None, (3, 4)),
        ("3 sec. to 4 sec.", None, (3, 4)),
        ("from 3 seconds to 4 seconds", None, (3, 4)),
        ("between 3.5 seconds and 4 seconds", None, (3.5, 4)),
        ("3 to 4 seconds", (3, 4), (3, 4)),
        ("3-4s", (3, 4), (3, 4)),
        ("3 s, 4 people", None, None),
        ("at 3 seconds and 4 of them", None, None),
        ("3 seconds", None, None),
        ("3 to 4 minutes", (3, 4), None),
        ("3 tons, 4 s", None, None),
    ],
)
def test_the_reward_reads_to_the_letter_and_evaluation_what_is_meant(text, strict, meant):
    assert find_interval(text) == strict
    assert find_named_interval(text) == meant


@pytest.mark.parametrize(
    "text",
    [
        "It starts at 20.3 and ends at 30.8.",
        '{"start_time": 20.3, "end_time": 30.8}',
        "start: 20.3, end: 30.8",
        "Start time: 30.8\nEnd time: 20.3",
        "[1, 2]; start: 20.3; end: 30.8",
    ],
)
def test_intervals_that_are_spelt_out(text):
    assert find_named_interval(text) == (20.3, 30.8)
    assert find_interval(text) == ((1, 2) if "[1, 2]" in text else None), "the reward knows no names"


@pytest.mark.parametrize(
    ("predicted", "true", "iou"),
    [
        ((0, 10), (0, 10), 1),
        ((0, 10), (5, 15), 1 / 3),
        ((0, 10), (10, 20), 0),
        ((0, 1), (2, 3), 0),
        ((2, 4), (0, 10), 0.2),
        ((10, 0), (15, 5), 1 / 3),
        ((5, 5), (0, 10), 0),
        ((5, 5), (5, 5), 0),
        ((0, 10), (5, 5), 0),
        ((20.3, 30.8), (20.3, 30.8), 1),
    ],
)
def test_temporal_iou(predicted, true, iou):
    assert temporal_iou(predicted, true) == pytest.approx(iou, abs=1e-12)


def test_temporal_iou_counted_second_by_second():
    """Against sets of whole seconds, on random intervals."""
    rng = random.Random(0)
    for _ in range(500):
        predicted, true = (sorted(rng.sample(range(30), 2)) for _ in range(2))
        first, second = set(range(*predicted)), set(range(*true))
        assert temporal_iou(predicted, true) == pytest.approx(len(first & second) / len(first | second))
        assert temporal_iou(predicted, true) == temporal_iou(true, predicted)
        assert temporal_iou(predicted[::-1], true) == temporal_iou(predicted, true)


def test_numbers_too_large_to_compare():
    """A model may write 400 digits; what it earns is a number all the same."""
    endless = find_interval(f"[0, {'9' * 400}]")
    assert endless == (0, math.inf)
    assert temporal_iou(endless, (0, 10)) == 0
    assert temporal_iou(endless, endless) == 0
    assert temporal_iou((math.inf, math.inf), (0, 10)) == 0


@pytest.mark.parametrize(("interval", "point"), [((5, 5), True), ((5.0, 5.0 + 1e-10), True), ((5, 5.1), False)])
def test_points(interval, point):
    assert is_point(interval) is point


def test_the_best_segment():
    segments = [(0, 10), (20, 30), (24, 26)]
    assert best_iou((20, 25), segments) == 0.5  # of 0, 5/10 and 1/6
    assert best_iou((24, 26), segments) == 1
    assert best_iou((12, 13), segments) == 0
    assert best_iou((5, 5), segments) == 0
    assert best_iou(None, segments) == 0


@pytest.mark.parametrize(
    ("answer", "segments"),
    [
        ([1, 2.5], [(1, 2.5)]),
        ([[3, 1], [4, 5]], [(1, 3), (4, 5)]),
        ([(1, 2)], [(1, 2)]),
        ("[1.0, 2.5]", [(1, 2.5)]),
        ("[1, 2], [3, 4]", [(1, 2), (3, 4)]),
        (["1.0", "2.5"], [(1, 2.5)]),
    ],
)
def test_segments(answer, segments):
    assert segments_of(answer) == segments


@pytest.mark.parametrize(
    "answer", [None, "", "A", [], [1], [1, 2, 3], [[1, 2], [3]], [["a", "b"]], [1, math.nan], [[[1]]], [1, 10**400]]
)
def test_what_holds_no_segment(answer):
    with pytest.raises(DataError, match="holds no segment; expected"):
        segments_of(answer)
