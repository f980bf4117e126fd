r"""Grade an answer as the public evaluations do.

The answer is the final box, else the last box anywhere, else the text outside the reasoning. It is then read leniently,
while the training reward is strict (there, `A. text` is not a letter).

Choices. The public graders differ: Video-MME, LongVideoBench and NExT-GQA take the first capital that is one of the
letters, MVBench a leading `A.` or the first single letter, VideoMMMU a declared letter ("the answer is B"). They agree
on the forms that models write into a box: `A`, `(A)`, `A.`, `A) text`, `A. text`. Here these forms come first, then the
text of an option, then a declared letter, then the first single capital.

Departures from the public graders, all of them on answers in other forms than those:
- A letter within a word is not a choice: "Black dog" is not B, as it is for Video-MME's pattern.
- The text of an option chooses that option. Their patterns see no letter in "red" and an A in "A red ball".
- A word is not a choice: the I of "I think C", the article of "A man runs", the letter of "X-ray".
- An answer without a choice is wrong; LongVideoBench's grader draws a choice at random then.
- MMVU has open questions judged by a language model, VideoMMMU by substrings and by numbers to two decimals. Here
  numbers and texts must be equal, or equal for `math-verify` if that is installed (extra `math`).

Intervals are read as `mlxvr.grading.intervals` reads them for evaluation: two numbers with `,`, a dash, `to` or `and`
between, in brackets or not, with or without `s` or `seconds`; swapped ends are put in order. Clock times (1:23) are not
intervals. A point, or no interval, scores 0; of several ground-truth segments the best counts. Grounded QA is
`answer <> [start, end]`, and its two parts are graded separately; without `<>` both are read from the whole text.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from mlxvr.answering.boxes import Scanner
from mlxvr.answering.transcript import is_fallback, parse
from mlxvr.errors import DataError
from mlxvr.grading import math_equality
from mlxvr.grading.choices import find_letter, named_letter, normalize, unwrap
from mlxvr.grading.intervals import Interval, best_iou, find_named_interval, is_point, segments_of

__all__ = ["Grade", "final_answer", "grade", "grade_parts"]

_RIGHT_IOU = 0.5  # the least IoU of an interval that counts as right
_TWO_PARTS = "<>"
_LAST_LETTER = "E"  # the last choice that the public patterns know, for options that are part of the question's text

_YES = frozenset({"yes", "y", "true", "t", "ok", "okay"})
_NO = frozenset({"no", "n", "false", "f"})
_SPOKEN = re.compile(r"(yes|no|true|false)\s*[,.;:!]")
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)
_FRACTION = re.compile(r"([+-]?)\s*\\[dtc]?frac\s*\{?([^{}]+)\}?\s*\{?([^{}]+)\}?|([^/]+)/([^/]+)")
_MATH_NOISE = re.compile(r"\\(?:left|right|displaystyle|[,;:! ])|[$\s]")


@dataclass(frozen=True, kw_only=True)
class Grade:
    """The score of each part of an answer; None for a part that answers of this kind do not have.

    Attributes:
        accuracy: 1.0 for a right answer, else 0.0 (exact_match, math, gqa).
        iou: temporal IoU of the interval with the best ground-truth segment (iou, gqa).
        iop: the share of the predicted interval within the best segment (iou, gqa); NExT-GQA's Acc@GQA demands 0.5.
    """

    accuracy: float | None = None
    iou: float | None = None
    iop: float | None = None

    @property
    def score(self) -> float:
        """A number in [0, 1]: the accuracy, the IoU, or for grounded QA their mean (half of the reward's sum)."""
        parts = [part for part in (self.accuracy, self.iou) if part is not None]
        return math.fsum(parts) / len(parts) if parts else 0.0

    @property
    def is_right(self) -> bool:
        """Whether every part is right; an interval is right if its IoU is at least 0.5."""
        return self.accuracy in (None, 1.0) and (self.iou is None or self.iou >= _RIGHT_IOU)


def grade(kind: str, text: str | None, answer: str | Sequence[Any] | None, options: Sequence[str] = ()) -> float:
    """Grade an answer by a number from 0 to 1; `Grade.score` says which number it is for each kind.

    Args:
        kind: "exact_match", "math", "iou" or "gqa".
        text: the model's answer, the content of a box or a whole output; None if it gave none.
        answer: the ground truth. exact_match, math: a letter, an option's text or a free text, or a list of these, any
            of which is right. iou: [start, end] or a list of such, or a text that holds them. gqa: a text
            `answer <> [start, end]`, or [answer, segments].
        options: the choices, with or without their letters.

    Raises `DataError` if the ground truth does not have that form.
    """
    return grade_parts(kind, text, answer, options).score


def grade_parts(kind: str, text: str | None, answer: str | Sequence[Any] | None, options: Sequence[str] = ()) -> Grade:
    """Grade an answer part by part; takes and raises the same as `grade`."""
    final = final_answer(text or "")
    if kind in ("exact_match", "math"):
        return Grade(accuracy=_accuracy(final, answer, options, is_math=kind == "math"))
    if kind == "iou":
        iou, iop = _overlap(find_named_interval(final), segments_of(answer))
        return Grade(iou=iou, iop=iop)
    if kind == "gqa":
        truth, segments = _two_parts(answer)
        parts = final.split(_TWO_PARTS)
        iou, iop = _overlap(find_named_interval(parts[-1]), segments)
        return Grade(accuracy=_accuracy(parts[0], truth, options, is_math=False), iou=iou, iop=iop)
    raise DataError(f"kind {kind!r} cannot be graded; expected exact_match, math, iou or gqa")


def final_answer(text: str) -> str:
    """Return the final box of an output, else its last box, else the text outside the reasoning, stripped."""
    scanner = Scanner()
    scanner.feed(text)
    boxes = scanner.closing or [*scanner.opening, *([scanner.reasoning_box] if scanner.reasoning_box else [])]
    return text[slice(*boxes[-1].content)].strip() if boxes else parse(text).outside.strip()


def _overlap(interval: Interval | None, segments: list[Interval]) -> tuple[float, float]:
    """Return the best IoU and the best intersection over prediction, each over all segments."""
    if interval is None or is_point(interval):
        return 0.0, 0.0
    length = interval[1] - interval[0]
    shared = (max(0.0, min(interval[1], end) - max(interval[0], start)) for start, end in segments)
    return best_iou(interval, segments), max(shared) / length


def _two_parts(answer: str | Sequence[Any] | None) -> tuple[Any, list[Interval]]:
    """Split a grounded question's ground truth into the answer and its segments."""
    if isinstance(answer, str) and _TWO_PARTS in answer:
        truth, _, segments = answer.partition(_TWO_PARTS)
        return truth.strip(), segments_of(segments)
    if isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == 2:
        return answer[0], segments_of(answer[1])
    raise DataError(f"answer {answer!r} of a grounded question; expected 'answer <> [start, end]'")


def _accuracy(text: str, answer: str | Sequence[Any] | None, options: Sequence[str], *, is_math: bool) -> float:
    """Return 1.0 if the text is one of the right answers, else 0.0."""
    truths = [answer] if isinstance(answer, str) or not isinstance(answer, Sequence) else list(answer)
    if not truths or any(isinstance(truth, dict | list | None) for truth in truths):
        raise DataError(f"answer {answer!r} cannot be graded; expected a letter, a text or a number")
    if is_fallback(text):
        return 0.0
    return float(any(_is_same(text, str(truth), options, is_math) for truth in truths))


def _is_same(text: str, truth: str, options: Sequence[str], is_math: bool) -> bool:
    letters = ascii_uppercase[: len(options)]
    wanted = named_letter(truth, letters or ascii_uppercase, options)
    if wanted is None:
        return _is_equal(text, truth) or (is_math and _is_equal_math(text, truth))
    if options:
        return find_letter(text, letters, options) == wanted
    offered = ascii_uppercase[: ascii_uppercase.index(max(wanted, _LAST_LETTER)) + 1]
    letter = find_letter(text, offered, options)
    return letter == wanted if letter else _is_equal(text, truth)


def _is_equal(text: str, truth: str) -> bool:
    """Return whether the texts are equal, the numbers are equal, or both mean yes or both mean no."""
    answer, wanted = normalize(unwrap(text)), normalize(unwrap(truth))
    if answer == wanted:
        return bool(answer) or text.strip() == truth.strip()
    if wanted in _YES | _NO:
        spoken = _SPOKEN.match(unwrap(text).casefold())
        answer = spoken[1] if spoken else answer
        return answer in _YES if wanted in _YES else answer in _NO
    numbers = _number(answer), _number(wanted)
    return None not in numbers and math.isclose(*numbers, rel_tol=1e-6)  # type: ignore[arg-type]


def _number(text: str) -> float | None:
    """Return the number that is the whole text, with or without commas between thousands; None if it is none."""
    if not any(map(str.isdigit, text)) or not _PLAIN_NUMBER.fullmatch(text):
        return None
    return float(text.replace(",", ""))


def _is_equal_math(text: str, truth: str) -> bool:
    """Return whether formulas are equal without their typesetting commands, by value, or for `math-verify`."""
    answer, wanted = (_MATH_NOISE.sub("", unwrap(side)).replace("\\%", "%").rstrip(".") for side in (text, truth))
    if answer == wanted:
        return True
    values = _value(answer), _value(wanted)
    if None not in values:
        return math.isclose(*values, rel_tol=1e-6) or _value(answer.rstrip("%")) == _value(wanted.rstrip("%"))  # type: ignore[arg-type]
    formulas = (f"${unwrap(side).strip('$')}$" for side in (text, truth))
    return math_equality.is_available() and math_equality.are_equal(*formulas)


def _value(formula: str) -> float | None:
    """Return the value of a number, a fraction or a percentage; None for anything else."""
    if formula.endswith("%"):
        share = _value(formula[:-1])
        return None if share is None else share / 100
    fraction = _FRACTION.fullmatch(formula)
    if fraction:
        sign, *parts = (group for group in fraction.groups(default=""))
        above, below = (_number(part) for part in (parts[:2] if parts[0] else parts[2:]))
        return None if above is None or not below else (-above if sign == "-" else above) / below
    return _number(formula)
