r"""What a completion earns in training (arXiv 2601.05175, section 3; rules and weights as in the public code).

    R = 0.9 R1(a1) + 1.1 R2(a2) + 1.0 Rformat + 0.3 Rfallback

a1 is the box in the text before the first `<think>`, a2 the box in the text after the last `</think>`. A tag that is
missing cuts nothing off, so both are read from a completion that is one box. Where there is not exactly one box the
answer is empty and earns nothing; a box that never closes is none. R1 and R2 by the kind of the question:

    exact_match   equal after NFKC, lower case and single spaces. One letter is that letter, alone, in any bracket
                  (`(A)`, `[A]`) or before one of `) : ; / -`. yes/y/true/t/ok/okay and no/n/false/f, whatever
                  punctuation is around them, are the two words. `A.` and `A. text` are no letter here: evaluation reads
                  more kindly (`mlxvr.grading.lenient`)
    math          equal for the package `math-verify`, which reads numbers, fractions and percentages as they are. A
                  truth in `$..$` says that the answer may be a formula, and it is then read as one too
    iou           temporal IoU of the first interval in the text with the best of the true segments; 0 for a point
    gqa           `answer <> [start, end]`: the sum of both, from 0 to 2. Without `<>` both are read from the whole

Rformat is 1 for a box, one `<think>..</think>`, a box, and nothing else but space. Rfallback is 1 when R2 > 0.7 and a1
declines ("Let's analyze ..."); the public code adds 0.3 / 1.1 within R2, which is the same in total.

A letter is a letter first, as in the public grader: a bare `y` is not `yes` (an option may be Y), `y.` is.

Departures from the public code
- Braces balance at any depth: `\boxed{\frac{\sqrt{3}}{2}}` is a box. Its patterns give up at the second level.
- Reasoning that is empty has not the format; its pattern means to refuse that, and lets it pass.
- A formula that is written bare (`2\sqrt{2}`) it can never find equal; `$..$` around the truth lets it. What it does
  find equal (`12 cm^2` and `$12$`) is equal here as well.
- Errors are not rewards of 0: a truth of the wrong form is said to be wrong.
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
    "agree",
    "answers",
    "ask_reward",
    "format_reward",
    "load_reward",
    "most",
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
_SURE = 0.7  # R2 above which having declined to answer directly is rewarded
_GROUP = "mlxvr.rewards"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What each part of a reward counts; any finite numbers."""

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
    """What a completion earned.

    Attributes:
        total: the weighted sum of the parts.
        first, second: R1 and R2, in [0, 1], for gqa in [0, 2].
        format: 1.0 or 0.0.
        fallback: 1.0 when declining the direct answer was right, else 0.0.
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
        completion: what the model wrote, without the token that ends its turn.
        answer: the truth, as `Row.answer` holds it or as the file gives it: a letter, a text or a formula; for "iou"
            [start, end] in seconds or a list of such; for "gqa" [text, segments], `text <> [start, end]`, or a mapping
            of "answer" and "segments".
        kind: "exact_match", "math", "iou" or "gqa".
        weights: of the parts.

    Raises:
        DataError: the truth is not of that form, or the kind is unknown.
        ConfigError: the kind is "math", and `math-verify` is not installed.
    """
    rate = _judge(answer, kind)
    said_first, said_second = answers(completion)
    first, second, well_formed = rate(said_first), rate(said_second), format_reward(completion)
    fallback = float(second > _SURE and said_first.startswith(_DECLINES))
    total = weights.first * first + weights.second * second + weights.format * well_formed + weights.fallback * fallback
    return Reward(total=total, first=first, second=second, format=well_formed, fallback=fallback)


def most(kind: str) -> float:
    """The most that an answer can earn, unweighted: 2 for "gqa", which is the sum of two parts, else 1."""
    return 2.0 if kind == "gqa" else 1.0


def answers(completion: str) -> tuple[str, str]:
    """a1 and a2 as the reward reads them, outer space removed; "" where there is not exactly one box."""
    return _only_box(completion.partition(_THINK)[0]), _only_box(completion.rpartition(_END_THINK)[2])


def agree(one: str, other: str, kind: str = "exact_match") -> float:
    """How far two answers say the same, in [0, 1]: equality or IoU as in `score`, for "gqa" half of each.

    An answer that is empty or declines agrees with nothing; formulas of the same text agree. Raises as `score`.
    """
    if any(not said.strip() or said.lstrip().startswith(_DECLINES) for said in (one, other)):
        return 0.0
    if kind == "iou":
        return _iou(one, other)
    if kind == "gqa":
        (text, where), (other_text, other_where) = _two_parts(one), _two_parts(other)
        return (float(_is_same(text, other_text)) + _iou(where, other_where)) / 2
    if kind == "math" and _is_same(one, other):
        return 1.0
    if _FORMULA.fullmatch(one):  # either one may say that both are formulas
        one, other = other, one
    return _judge(other, kind)(one)


def format_reward(completion: str) -> float:
    """1.0 for a box, one `<think>..</think>` that is not empty, a box, and nothing else but space; else 0.0."""
    if completion.count(_THINK) != 1 or completion.count(_END_THINK) != 1:
        return 0.0
    before, _, rest = completion.partition(_THINK)
    reasoning, _, after = rest.partition(_END_THINK)
    return float(bool(reasoning.strip()) and _is_box(before) and _is_box(after))


def load_reward(name: str) -> RewardFunction:
    """A reward function of the user's own.

    Args:
        name: `module:function`, the module installed or in the working directory; or the name of an entry point of the
            group `mlxvr.rewards`. The function takes a completion's text and its `mlxvr.data.rows.Row`, and
            returns a number or a `Reward`.

    Raises `ConfigError` when there is no such function, or its module fails.
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


def ask_reward(function: RewardFunction, text: str, row: Row) -> Reward:
    """What a user's own function says of a completion; the parts of a plain number are NaN.

    Raises:
        ConfigError: the function failed.
        DataError: what it returned is no reward. Both messages begin with the row's line.
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


def _judge(answer: Any, kind: str) -> Callable[[str], float]:
    """What rates an answer. The truth is looked at here, so that a wrong one is refused whatever was answered."""
    if kind == "iou":
        segments = segments_of(answer)
        return lambda said: best_iou(find_interval(said), segments)
    if kind == "gqa":
        return _judge_grounded(answer)
    if kind not in ("exact_match", "math"):
        raise DataError(f"kind {kind!r} has no reward; expected exact_match, math, iou or gqa")
    truth = _text_of(answer)
    if kind == "exact_match":
        return lambda said: float(_is_same(said, truth))
    math_equality.require()
    return lambda said: float(_is_same_formula(said, truth))


def _judge_grounded(answer: Any) -> Callable[[str], float]:
    if isinstance(answer, str) and _TWO_PARTS in answer:
        text, where = _two_parts(answer)
    elif isinstance(answer, Mapping) and "answer" in answer:
        text, where = answer["answer"], answer.get("segments", answer.get("segment"))
    elif isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == 2:
        text, where = answer
    else:
        raise DataError(f"answer {answer!r} of a grounded question; expected 'answer <> [start, end]'")
    truth, segments = _text_of(text), segments_of(where)

    def rate(said: str) -> float:
        text, where = _two_parts(said)
        return _is_same(text, truth) + best_iou(find_interval(where), segments)

    return rate


def _text_of(answer: Any) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise DataError(f"answer {answer!r} cannot be compared; expected a letter, a text or a number")
    return str(answer).strip()


def _two_parts(text: str) -> tuple[str, str]:
    """Before the first and after the last `<>`; without one both are the whole."""
    return text.partition(_TWO_PARTS)[0], text.rpartition(_TWO_PARTS)[2]


def _iou(one: str, other: str) -> float:
    first, second = find_interval(one), find_interval(other)
    return 0.0 if first is None or second is None else temporal_iou(first, second)


def _is_same(said: str, truth: str) -> bool:
    return _canonical(said) == _canonical(truth)


def _canonical(text: str) -> str:
    """One spelling for all that are the same."""
    text = unicodedata.normalize("NFKC", text).strip().lower()
    letter = _LETTER.fullmatch(text)
    if letter:
        return letter[1] or letter[2]
    word = _WORD.fullmatch(text)
    boolean = _BOOLEANS.get(word[1]) if word else None
    return boolean or " ".join(text.split())


def _is_same_formula(said: str, truth: str) -> bool:
    if not said:
        return False
    if math_equality.are_equal(said, truth):
        return True
    return _FORMULA.fullmatch(truth) is not None and "$" not in said and math_equality.are_equal(f"${said}$", truth)


def _boxes(text: str) -> list[tuple[int, int]]:
    r"""Where the contents of the closed boxes stand that are in no other: characters [start, end).

    One pass, whatever braces there are.
    """
    found: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where the content of a box starts; None: a brace that is no box's
    for mark in _BRACES.finditer(text):
        if mark.group() != "}":
            opened.append(mark.end() if mark.group() == _BOX else None)
        elif opened and (start := opened.pop()) is not None:
            while found and found[-1][0] > start:
                found.pop()
            found.append((start, mark.start()))
    return found


def _only_box(text: str) -> str:
    boxes = _boxes(text)
    return text[slice(*boxes[0])].strip() if len(boxes) == 1 else ""


def _is_box(text: str) -> bool:
    """Whether a text is one box and space around it."""
    boxes = _boxes(text)
    if len(boxes) != 1:
        return False
    start, end = boxes[0]
    return not text[: start - len(_BOX)].strip() and not text[end + 1 :].strip()
