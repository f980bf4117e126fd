r"""Grading an answer as the public evaluation grades it.

The answer is the final box, else the last box anywhere, else the text outside the reasoning. What a box may say is then
read kindly, unlike in training, where the reward is strict (`A. text` is no letter there).

Choices. The public graders differ: Video-MME, LongVideoBench and NExT-GQA take the first capital that is one of the
letters, MVBench a leading `A.` or the first letter that stands alone, VideoMMMU what is declared ("the answer is B").
They agree on what models write into a box: `A`, `(A)`, `A.`, `A) text`, `A. text`. Here these forms come first, then
the text of an option, then a declared letter, then the first capital that stands alone.

Departures from the public graders, each on answers that are not of those forms
- A letter within a word is no choice: "Black dog" is not B, as it is for Video-MME's pattern.
- The text of an option is that option. Their patterns see no letter in "red" and an A in "A red ball".
- A word is no choice: the I of "I think C", the article of "A man runs", the letter of "X-ray".
- Where nothing is found the answer is wrong; LongVideoBench's grader then draws a choice at random.
- Open questions are judged by a language model in MMVU, and in VideoMMMU by substrings and numbers to two decimals.
  Here numbers and texts must be equal, or equal for `math-verify` where that is installed (extra `math`).

Intervals are those of the training reward and the public evaluator: two numbers with `,`, a dash, `to` or `and`
between, in brackets or not, with `s` or `seconds` behind them or not; swapped ends are put in order; a point, or no
interval, scores 0; of several ground-truth segments the best counts. Clock times (1:23) are none. Grounded QA is
`answer <> [start, end]` and graded in its two parts; without `<>` both are read from the whole.
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
from mlxvr.grading.choices import find_letter, named_letter, normal, unwrap
from mlxvr.grading.intervals import Interval, best_iou, find_named_interval, is_point, segments_of

__all__ = ["Grade", "final_answer", "grade", "grade_parts"]

_RIGHT_IOU = 0.5  # an interval that overlaps this much is right where right or wrong must be said
_TWO_PARTS = "<>"
_LAST_LETTER = "E"  # of the choices that the public patterns know, where the options stand in the question

_YES = frozenset({"yes", "y", "true", "t", "ok", "okay"})
_NO = frozenset({"no", "n", "false", "f"})
_SAID = re.compile(r"(yes|no|true|false)\s*[,.;:!]")
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)
_FRACTION = re.compile(r"([+-]?)\s*\\[dtc]?frac\s*\{?([^{}]+)\}?\s*\{?([^{}]+)\}?|([^/]+)/([^/]+)")
_MATH_NOISE = re.compile(r"\\(?:left|right|displaystyle|[,;:! ])|[$\s]")


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What an answer is worth, part by part; a part that its kind does not have is None.

    Attributes:
        accuracy: 1.0 for a right answer, else 0.0 (exact_match, math, gqa).
        iou: temporal IoU of the interval with the best ground-truth segment (iou, gqa).
        iop: the share of the predicted interval within the best segment (iou, gqa); NExT-GQA's Acc@GQA wants 0.5.
    """

    accuracy: float | None = None
    iou: float | None = None
    iop: float | None = None

    @property
    def score(self) -> float:
        """One number in [0, 1]: the accuracy, the IoU, or for grounded QA their mean (half of the reward's sum)."""
        parts = [part for part in (self.accuracy, self.iou) if part is not None]
        return math.fsum(parts) / len(parts) if parts else 0.0

    @property
    def is_right(self) -> bool:
        """Whether every part is right; an interval is from an IoU of 0.5."""
        return self.accuracy in (None, 1.0) and (self.iou is None or self.iou >= _RIGHT_IOU)


def grade(kind: str, text: str | None, answer: str | Sequence[Any] | None, options: Sequence[str] = ()) -> float:
    """Grade an answer in one number from 0 to 1; see `Grade.score` for what it is of which kind.

    Args:
        kind: "exact_match", "math", "iou" or "gqa".
        text: what the model said: the content of a box, or a whole output; None: nothing.
        answer: the ground truth. exact_match, math: a letter, an option's text or a free text; a list of them: any
            counts. iou: [start, end] or a list of such, or a text that holds them. gqa: a text
            `answer <> [start, end]`, or [answer, segments].
        options: the choices, with or without their letters.

    Raises `DataError` when the ground truth is not of that form.
    """
    return grade_parts(kind, text, answer, options).score


def grade_parts(kind: str, text: str | None, answer: str | Sequence[Any] | None, options: Sequence[str] = ()) -> Grade:
    """Grade an answer part by part; arguments and errors as those of `grade`."""
    said = final_answer(text or "")
    if kind in ("exact_match", "math"):
        return Grade(accuracy=_accuracy(said, answer, options, is_math=kind == "math"))
    if kind == "iou":
        iou, iop = _overlap(find_named_interval(said), segments_of(answer))
        return Grade(iou=iou, iop=iop)
    if kind == "gqa":
        truth, segments = _two_parts(answer)
        parts = said.split(_TWO_PARTS)
        iou, iop = _overlap(find_named_interval(parts[-1]), segments)
        return Grade(accuracy=_accuracy(parts[0], truth, options, is_math=False), iou=iou, iop=iop)
    raise DataError(f"kind {kind!r} cannot be graded; expected exact_match, math, iou or gqa")


def final_answer(text: str) -> str:
    """The final box of an output, else its last box, else what stands outside the reasoning; outer space removed."""
    scanner = Scanner()
    scanner.feed(text)
    boxes = scanner.closing or [*scanner.opening, *([scanner.note] if scanner.note else [])]
    return text[slice(*boxes[-1].content)].strip() if boxes else parse(text).outside.strip()


def _overlap(interval: Interval | None, segments: list[Interval]) -> tuple[float, float]:
    """IoU and intersection over prediction with the best segment of each."""
    if interval is None or is_point(interval):
        return 0.0, 0.0
    length = interval[1] - interval[0]
    shared = (max(0.0, min(interval[1], end) - max(interval[0], start)) for start, end in segments)
    return best_iou(interval, segments), max(shared) / length


def _two_parts(answer: str | Sequence[Any] | None) -> tuple[Any, list[Interval]]:
    """Answer and segments of a grounded question's ground truth."""
    if isinstance(answer, str) and _TWO_PARTS in answer:
        truth, _, segments = answer.partition(_TWO_PARTS)
        return truth.strip(), segments_of(segments)
    if isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == 2:
        return answer[0], segments_of(answer[1])
    raise DataError(f"answer {answer!r} of a grounded question; expected 'answer <> [start, end]'")


def _accuracy(said: str, answer: str | Sequence[Any] | None, options: Sequence[str], *, is_math: bool) -> float:
    """1.0 when what was said is one of the answers that count."""
    truths = [answer] if isinstance(answer, str) or not isinstance(answer, Sequence) else list(answer)
    if not truths or any(isinstance(truth, dict | list | None) for truth in truths):
        raise DataError(f"answer {answer!r} cannot be graded; expected a letter, a text or a number")
    if is_fallback(said):
        return 0.0
    return float(any(_is_same(said, str(truth), options, is_math) for truth in truths))


def _is_same(said: str, truth: str, options: Sequence[str], is_math: bool) -> bool:
    letters = ascii_uppercase[: len(options)]
    wanted = named_letter(truth, letters or ascii_uppercase, options)
    if wanted is None:
        return _is_equal(said, truth) or (is_math and _is_equal_math(said, truth))
    if options:
        return find_letter(said, letters, options) == wanted
    offered = ascii_uppercase[: ascii_uppercase.index(max(wanted, _LAST_LETTER)) + 1]
    found = find_letter(said, offered, options)
    return found == wanted if found else _is_equal(said, truth)


def _is_equal(said: str, truth: str) -> bool:
    """Equal texts, equal numbers, or the same of yes and no."""
    one, other = normal(unwrap(said)), normal(unwrap(truth))
    if one == other:
        return bool(one) or said.strip() == truth.strip()
    if other in _YES | _NO:
        spoken = _SAID.match(unwrap(said).casefold())
        one = spoken[1] if spoken else one
        return one in _YES if other in _YES else one in _NO
    numbers = _number(one), _number(other)
    return None not in numbers and math.isclose(*numbers, rel_tol=1e-6)  # type: ignore[arg-type]


def _number(text: str) -> float | None:
    """A number that is the whole text, thousands separated by commas or not."""
    if not any(map(str.isdigit, text)) or not _PLAIN_NUMBER.fullmatch(text):
        return None
    return float(text.replace(",", ""))


def _is_equal_math(said: str, truth: str) -> bool:
    """Equal as mathematics: without what only sets the formula, by value, or for `math-verify`."""
    one, other = (_MATH_NOISE.sub("", unwrap(text)).replace("\\%", "%").rstrip(".") for text in (said, truth))
    if one == other:
        return True
    values = _value(one), _value(other)
    if None not in values:
        return math.isclose(*values, rel_tol=1e-6) or _value(one.rstrip("%")) == _value(other.rstrip("%"))  # type: ignore[arg-type]
    formulas = (f"${unwrap(text).strip('$')}$" for text in (said, truth))
    return math_equality.is_available() and math_equality.are_equal(*formulas)


def _value(formula: str) -> float | None:
    """The value of a number, a fraction or a percentage."""
    if formula.endswith("%"):
        share = _value(formula[:-1])
        return None if share is None else share / 100
    fraction = _FRACTION.fullmatch(formula)
    if fraction:
        sign, *parts = (group for group in fraction.groups(default=""))
        above, below = (_number(part) for part in (parts[:2] if parts[0] else parts[2:]))
        return None if above is None or not below else (-above if sign == "-" else above) / below
    return _number(formula)
