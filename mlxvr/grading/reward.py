r"""The reward of a completion in training (arXiv 2601.05175, section 3; rules and weights as in the public code).

    R = 0.9 R1(a1) + 1.1 R2(a2) + 1.0 Rformat + 0.3 Rfallback

a1 is the box in the text before the first `<think>`, a2 the box in the text after the last `</think>`. Without a tag
nothing is cut off, so both are read from a completion that is a single box. If a text does not have exactly one box,
its answer is empty and earns nothing; a box that never closes does not count. R1 and R2 depend on the kind of the
question:

    exact_match   equal after NFKC, lower case and single spaces. A letter may be alone, in any bracket (`(A)`, `[A]`)
                  or before one of `) : ; / -`. yes/y/true/t/ok/okay are the same word, and so are no/n/false/f, with
                  any punctuation around them. `A.` and `A. text` are not letters here: evaluation reads more leniently
                  (`mlxvr.grading.lenient`)
    math          equal for the package `math-verify`, which reads numbers, fractions and percentages as they are. If
                  the truth is in `$..$`, the answer may be a bare formula, and is then read as a formula too
    iou           temporal IoU of the first interval in the text with the best of the true segments; 0 for a point
    gqa           `answer <> [start, end]`: the sum of both, from 0 to 2. Without `<>` both are read from the whole

Rformat is 1 for a box, one `<think>..</think>`, a box, and nothing else but space. Rfallback is 1 if R2 > 0.7 and a1
declines ("Let's analyze ..."); the public code adds 0.3 / 1.1 within R2, which gives the same total.

A single letter counts as a letter before it counts as a word, as in the public grader: `y` is not `yes` (an option may
be Y), but `y.` is.

Departures from the public code
- Braces balance at any depth: `\boxed{\frac{\sqrt{3}}{2}}` is a box. The public patterns give up at the second level.
- Empty reasoning does not have the format. The public pattern is meant to refuse it too, but lets it pass.
- The public code never finds a bare formula (`2\sqrt{2}`) equal; here it can be if the truth is in `$..$`. Answers that
  the public code does find equal (`12 cm^2` and `$12$`) are equal here as well.
- Errors are not rewards of 0: a truth of the wrong form raises `DataError`.
"""

import importlib
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from operator import attrgetter
from typing import Any, TypeAlias

from mlxvr.data.rows import Row
from mlxvr.errors import ConfigError, DataError
from mlxvr.grading import math_equality
from mlxvr.grading.intervals import best_iou, find_interval, segments_of, temporal_iou

__all__ = [
    "Reward",
    "RewardFunction",
    "Weights",
    "answers",
    "call_reward",
    "compare_answers",
    "format_reward",
    "highest_reward",
    "load_reward",
    "score",
]

_BOX, _THINK, _END_THINK = "\\boxed{", "<think>", "</think>"
_BRACES = re.compile(r"\\boxed\{|[{}]")
_LETTER = re.compile(r"(?:[(\[{]\s*([a-z])\s*[)\]}]|([a-z]))\s*[):;/-]?")
_WORD = re.compile(r"\W*(\w+)\W*")
_BOOLEANS = {
    **dict.fromkeys(("yes", "y", "true", "t", "ok", "okay"), "yes"),
    **dict.fromkeys(("no", "n", "false", "f"), "no"),
}
_FORMULA = re.compile(r"\$.+\$", re.DOTALL)
_TWO_PARTS = "<>"
_DECLINES = "Let's analyze"
_SURE = 0.7  # R2 above which it is rewarded to have declined the direct answer
_GROUP = "mlxvr.rewards"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weight of each part of a reward; any finite numbers."""

    first: float = 0.9
    second: float = 1.1
    format: float = 1.0
    fallback: float = 0.3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"the weight of the reward's part {field.name} is {value!r}: give a number")


_PAPER = Weights()


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The reward of a completion, and its parts.

    Attributes:
        total: the weighted sum of the parts.
        first, second: R1 and R2, in [0, 1], for gqa in [0, 2].
        format: 1.0 or 0.0.
        fallback: 1.0 if it was right to decline the direct answer, else 0.0.
    """

    total: float
    first: float
    second: float
    format: float
    fallback: float


RewardFunction: TypeAlias = Callable[[str, Row], float | Reward]


def score(completion: str, answer: Any, kind: str = "exact_match", *, weights: Weights = _PAPER) -> Reward:
    """Score a completion.

    Args:
        completion: the text that the model wrote, without the token that ends its turn.
        answer: the truth, in the form of `Row.answer` or of the file: a letter, a text or a formula; for "iou"
            [start, end] in seconds or a list of such; for "gqa" [text, segments], `text <> [start, end]`, or a mapping
            of "answer" and "segments".
        kind: "exact_match", "math", "iou" or "gqa".
        weights: the weights of the parts.

    Raises:
        DataError: the truth does not have that form, or the kind is unknown.
        ConfigError: the kind is "math", and `math-verify` is not installed.
    """
    rate = _make_rater(answer, kind)
    first_answer, second_answer = answers(completion)
    first, second, well_formed = rate(first_answer), rate(second_answer), format_reward(completion)
    fallback = float(second > _SURE and first_answer.startswith(_DECLINES))
    total = weights.first * first + weights.second * second + weights.format * well_formed + weights.fallback * fallback
    return Reward(total=total, first=first, second=second, format=well_formed, fallback=fallback)


def highest_reward(kind: str) -> float:
    """Return the most that an answer can earn, unweighted: 2 for "gqa", which is the sum of two parts, else 1."""
    return 2.0 if kind == "gqa" else 1.0


def answers(completion: str) -> tuple[str, str]:
    """Return a1 and a2 as the reward reads them, stripped; "" for a text without exactly one box."""
    return _only_box(completion.partition(_THINK)[0]), _only_box(completion.rpartition(_END_THINK)[2])


def compare_answers(answer: str, truth: str, kind: str = "exact_match") -> float:
    """Return how far two answers agree, in [0, 1]: equality or IoU as in `score`, for "gqa" half of each.

    An answer that is empty or declines agrees with nothing; formulas of the same text agree. Raises the same as
    `score`.
    """
    if any(not text.strip() or text.lstrip().startswith(_DECLINES) for text in (answer, truth)):
        return 0.0
    if kind == "iou":
        return _iou(answer, truth)
    if kind == "gqa":
        (text, interval), (true_text, true_interval) = _two_parts(answer), _two_parts(truth)
        return (float(_is_same(text, true_text)) + _iou(interval, true_interval)) / 2
    if kind == "math" and _is_same(answer, truth):
        return 1.0
    if _FORMULA.fullmatch(answer):  # `$..$` around either of them marks both as formulas
        answer, truth = truth, answer
    return _make_rater(truth, kind)(answer)


def format_reward(completion: str) -> float:
    """Return 1.0 for a box, one `<think>..</think>` that is not empty, a box, and nothing but space; else 0.0."""
    if completion.count(_THINK) != 1 or completion.count(_END_THINK) != 1:
        return 0.0
    before, _, rest = completion.partition(_THINK)
    reasoning, _, after = rest.partition(_END_THINK)
    return float(bool(reasoning.strip()) and _is_box(before) and _is_box(after))


def load_reward(name: str) -> RewardFunction:
    """Load a reward function of the user's own.

    Args:
        name: `module:function`, of a module that is installed or in the working directory; or the name of an entry
            point of the group `mlxvr.rewards`. The function takes a completion's text and its `mlxvr.data.rows.Row`,
            and returns a number or a `Reward`.

    Raises `ConfigError` if there is no such function, or its module fails.
    """
    module, separator, attribute = name.partition(":")
    points = {point.name: point for point in entry_points(group=_GROUP)}
    if not separator and name not in points:
        known = f" ({', '.join(sorted(points))})" if points else ""
        raise ConfigError(f"reward {name!r} is unknown: give module:function, or an entry point of {_GROUP}{known}")
    if separator and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look there
    try:
        function: Any = attrgetter(attribute)(importlib.import_module(module)) if separator else points[name].load()
    except Exception as error:  # a user's module may raise anything
        reason = " ".join(str(error).split())
        raise ConfigError(f"reward {name!r} cannot be loaded ({type(error).__name__}: {reason})") from error
    if not callable(function):
        raise ConfigError(f"reward {name!r} is of type {type(function).__name__}: give a function")
    return function


def call_reward(function: RewardFunction, text: str, row: Row) -> Reward:
    """Call a user's own function on a completion; if it returns a plain number, the reward's parts are NaN.

    Raises:
        ConfigError: the function failed.
        DataError: the function returned no reward. Both messages begin with the row's line.
    """
    try:
        earned = function(text, row)
    except Exception as error:  # a user's function may raise anything
        reason = " ".join(str(error).split())
        raise ConfigError(f"{row.line}: the reward function failed ({type(error).__name__}: {reason})") from error
    if isinstance(earned, Reward):
        return earned
    if isinstance(earned, bool | int | float) and math.isfinite(earned):
        nan = math.nan
        return Reward(total=float(earned), first=nan, second=nan, format=nan, fallback=nan)
    raise DataError(f"{row.line}: the reward function returned {earned!r}: a finite number or a Reward is needed")


def _make_rater(answer: Any, kind: str) -> Callable[[str], float]:
    """Return a function that rates answers. A truth of the wrong form is refused here, whatever the model answered."""
    if kind == "iou":
        segments = segments_of(answer)
        return lambda text: best_iou(find_interval(text), segments)
    if kind == "gqa":
        return _make_grounded_rater(answer)
    if kind not in ("exact_match", "math"):
        raise DataError(f"kind {kind!r} has no reward; expected exact_match, math, iou or gqa")
    truth = _text_of(answer)
    if kind == "exact_match":
        return lambda text: float(_is_same(text, truth))
    math_equality.require()
    return lambda text: float(_is_same_formula(text, truth))


def _make_grounded_rater(answer: Any) -> Callable[[str], float]:
    if isinstance(answer, str) and _TWO_PARTS in answer:
        true_text, true_segments = _two_parts(answer)
    elif isinstance(answer, Mapping) and "answer" in answer:
        true_text, true_segments = answer["answer"], answer.get("segments", answer.get("segment"))
    elif isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == 2:
        true_text, true_segments = answer
    else:
        raise DataError(f"answer {answer!r} of a grounded question; expected 'answer <> [start, end]'")
    truth, segments = _text_of(true_text), segments_of(true_segments)

    def rate(completed: str) -> float:
        text, interval = _two_parts(completed)
        return _is_same(text, truth) + best_iou(find_interval(interval), segments)

    return rate


def _text_of(answer: Any) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise DataError(f"answer {answer!r} cannot be compared; expected a letter, a text or a number")
    return str(answer).strip()


def _two_parts(text: str) -> tuple[str, str]:
    """Return the text before the first `<>` and the text after the last; without one, twice the whole text."""
    return text.partition(_TWO_PARTS)[0], text.rpartition(_TWO_PARTS)[2]


def _iou(answer: str, truth: str) -> float:
    predicted, true = find_interval(answer), find_interval(truth)
    return 0.0 if predicted is None or true is None else temporal_iou(predicted, true)


def _is_same(text: str, truth: str) -> bool:
    return _canonical(text) == _canonical(truth)


def _canonical(text: str) -> str:
    """Return the one spelling of all texts that count as the same."""
    text = unicodedata.normalize("NFKC", text).strip().lower()
    letter = _LETTER.fullmatch(text)
    if letter:
        return letter[1] or letter[2]
    word = _WORD.fullmatch(text)
    boolean = _BOOLEANS.get(word[1]) if word else None
    return boolean or " ".join(text.split())


def _is_same_formula(text: str, truth: str) -> bool:
    if not text:
        return False
    if math_equality.are_equal(text, truth):
        return True
    return _FORMULA.fullmatch(truth) is not None and "$" not in text and math_equality.are_equal(f"${text}$", truth)


def _boxes(text: str) -> list[tuple[int, int]]:
    r"""Return the contents of the outermost closed boxes as ranges of characters, [start, end).

    It takes one pass over the text, however many braces there are.
    """
    boxes: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where the content of an open box starts; None for a brace that opens no box
    for mark in _BRACES.finditer(text):
        if mark.group() != "}":
            opened.append(mark.end() if mark.group() == _BOX else None)
        elif opened and (start := opened.pop()) is not None:
            while boxes and boxes[-1][0] > start:
                boxes.pop()
            boxes.append((start, mark.start()))
    return boxes


def _only_box(text: str) -> str:
    boxes = _boxes(text)
    return text[slice(*boxes[0])].strip() if len(boxes) == 1 else ""


def _is_box(text: str) -> bool:
    """Return whether a text is one box with nothing but space around it."""
    boxes = _boxes(text)
    if len(boxes) != 1:
        return False
    start, end = boxes[0]
    return not text[: start - len(_BOX)].strip() and not text[end + 1 :].strip()
