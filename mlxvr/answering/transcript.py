r"""Reading ``\boxed{a1}<think>r</think>\boxed{a2}`` while it is written.

The text is read by its characters, never by token ids: box boundaries do not fall on token boundaries (Qwen writes
``\boxed{A}<think>`` as ``\`` ``boxed`` ``{`` ``A`` ``}<`` ``think`` ``>``). One scanner reads it in one pass, so that
the parser, fed token by token, and `parse`, given the whole, cannot disagree.

Decisions, each with its reason
- The first box is closed by the brace that balances it, and known to be closed at the token that carries that brace.
  The early exit is decided at that token, before ``<think>`` is spelled; the rest of the token belongs to the text.
- Braces are counted, escaped or not: ``\boxed{\{1, 2\}}`` balances and ``\boxed{\{1}`` never closes, as the public
  evaluator's pattern sees them. That pattern gives up at three levels of nesting; counting does not.
- ``<think>`` and ``</think>`` end the section that they occur in, even inside an open box. The public code cuts the
  text there before it looks for boxes, and a brace that was forgotten must not swallow the reasoning.
- Either tag before any closed box means that there is no direct answer: what follows has been reasoned about.
- The direct answer is the first box before the reasoning; the reviewed answer the last one after the last
  ``</think>``. Boxes inside the reasoning are notes. A model that repeats itself corrects itself, so the last counts;
  the first must count as soon as it closes.
- If the model ended its reasoning with a box instead of ``</think>`` and ended its turn there, that box is the reviewed
  answer; at the token limit it is not, since it may have been a note.
- Without any tag a second box is the reviewed answer and there is no reasoning, whatever text is between the boxes.
- A ``</think>`` without ``<think>`` ends reasoning that began after the last box, or at the start.
- Outer white space does not belong to an answer or to the reasoning, and is allowed between the parts, as in the
  format reward. An end-of-turn mark at the very end is not part of the text; the beginning of a mark that was cut off
  is no departure (``}<`` is one token, and an early exit stops at it).
- Whatever departs from the format is named in `Transcript.problems`; nothing is raised, nothing is made up.

Source: arXiv 2601.05175; its evaluator for the boxes, its format reward for what counts as a departure.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mlxvr.answering.boxes import Box, Scanner, Span
from mlxvr.answering.detokenizer import Detokenizer

__all__ = ["FALLBACK", "DualAnswerParser", "Stage", "Transcript", "is_fallback", "parse"]

FALLBACK = "Let's analyze the problem step by step."

Stage = Literal["start", "first_box", "after_first", "reasoning", "after_reasoning", "second_box", "done"]

_APOSTROPHES = "'`\u00b4\u02bc\u2018\u2019\u2032\uff07"
_FALLBACK = re.compile(rf"\s*(?:\\text\w*\s*\{{\s*)?let[{_APOSTROPHES}]s\s+analyze", re.IGNORECASE)
_END_OF_TURN = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class Transcript:
    """The parts of what the model wrote.

    Attributes:
        text: everything, without end-of-turn marks at the end.
        first: the direct answer, outer white space removed; None: no box was closed before the reasoning.
        first_span: characters [start, end) of the first box's content in `text`, white space included.
        reasoning: the text from the first ``<think>`` to the last ``</think>``, or as far as it got; None: none.
        second: the reviewed answer, outer white space removed, or None.
        second_span: as `first_span`.
        is_fallback: whether the first box holds the sentence that declines to answer directly.
        outside: the text outside the reasoning and the closed boxes; of a box that was never closed, its content.
        problems: departures from the format, in this order; empty when there are none.
            no_box: no box was opened outside the reasoning.
            no_first_box: the reasoning began before a box was opened.
            unterminated_box: a box was opened and not closed.
            empty_box: an answer is empty.
            repeated_box: there are more boxes than answers.
            no_think: there is no ``<think>``.
            unterminated_think: there is a ``<think>`` without ``</think>``.
            empty_think: there is nothing between them.
            repeated_think: there is more than one of them.
            no_second_box: there is a first box, and none was opened after the reasoning.
            extra_text: there is text outside the boxes and the reasoning.
            token_limit: the model was stopped while it wrote.
    """

    text: str
    first: str | None = None
    first_span: Span | None = None
    reasoning: str | None = None
    second: str | None = None
    second_span: Span | None = None
    is_fallback: bool = False
    outside: str = ""
    problems: tuple[str, ...] = ()


class DualAnswerParser:
    """Reads tokens as they are generated and knows after each one which part of the answer is being written.

    Args:
        detokenize: token ids -> text; called with a few ids at a time, so that the cost is linear in the tokens.
    """

    def __init__(self, detokenize: Callable[[list[int]], str]) -> None:
        self._detokenizer = Detokenizer(detokenize)
        self._scanner = Scanner()
        self._returned = 0  # characters of the reasoning that `take_reasoning` returned ..
        self._returned_to = 0  # .. and where they end in the text
        self._transcript: Transcript | None = None

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that has become readable (none within a character)."""
        delta = self._detokenizer.push(token_id)
        self._scanner.feed(delta)
        return delta

    def flush(self) -> str:
        """Return the text that was held back since it may be an incomplete character; no token may follow."""
        delta = self._detokenizer.flush()
        self._scanner.feed(delta)
        return delta

    def finish(self, *, hit_limit: bool = False) -> Transcript:
        """Return the transcript of what was written; `hit_limit` says that the token limit stopped the model."""
        self.flush()
        self._transcript = _sum_up(self._scanner, hit_limit)
        return self._transcript

    def take_reasoning(self) -> str:
        """Return the reasoning that became certain since the last call.

        Outer white space and what may be the beginning of a tag wait until more is known, so the pieces add up to the
        transcript's reasoning; call it once more after `finish`. (The exception is a box that ended the turn in the
        place of ``</think>``: it has been returned as reasoning already.)
        """
        if self._transcript is not None:
            rest = (self._transcript.reasoning or "")[self._returned :]
            self._returned += len(rest)
            return rest
        if self._scanner.reasoning is None:
            return ""
        begin, end = self._scanner.reasoning
        start = self._returned_to if self._returned else begin
        piece = self._scanner.text_from(start, end)
        if not self._returned:
            start += len(piece) - len(piece.lstrip())
            piece = piece.lstrip()
        piece = piece.rstrip()
        self._returned += len(piece)
        self._returned_to = start + len(piece)
        return piece

    @property
    def text(self) -> str:
        """Everything that is readable so far."""
        return self._scanner.text

    @property
    def token_spans(self) -> list[Span]:
        """For each token the characters [start, end) of `text` that it covers."""
        return self._detokenizer.spans

    @property
    def stage(self) -> Stage:
        """Which part is being written."""
        scanner = self._scanner
        if scanner.section == "reasoning":
            return "reasoning"
        if scanner.section == "opening":
            return "after_first" if scanner.opening else "first_box" if scanner.open_box else "start"
        return "done" if scanner.closing else "second_box" if scanner.open_box else "after_reasoning"

    @property
    def first_closed(self) -> bool:
        """Whether the first box is closed: true from the token that carries its closing brace."""
        return bool(self._scanner.opening)

    @property
    def first_span(self) -> Span | None:
        """Characters [start, end) of the first box's content, white space included, once it is closed."""
        return self._scanner.opening[0].content if self._scanner.opening else None

    @property
    def first(self) -> str | None:
        """The direct answer, once its box is closed."""
        return _content(self.text, self._scanner.opening[0]) if self._scanner.opening else None

    @property
    def reasoning(self) -> str | None:
        """The reasoning so far."""
        return _sum_up(self._scanner, hit_limit=True).reasoning

    @property
    def second(self) -> str | None:
        """The reviewed answer so far; what follows may still replace it."""
        return _sum_up(self._scanner, hit_limit=True).second


def parse(text: str, *, hit_limit: bool = False) -> Transcript:
    """Return the transcript of a whole output; `hit_limit` says that the token limit stopped the model."""
    scanner = Scanner()
    scanner.feed(text)
    return _sum_up(scanner, hit_limit)


def is_fallback(content: str) -> bool:
    r"""Whether a box declines to answer directly: its content starts with "Let's analyze".

    More lenient than the public evaluator, which compares exactly these characters: with another apostrophe, in another
    case or in ``\text{}``, the sentence is no answer to exit with either.
    """
    return _FALLBACK.match(content) is not None


def _sum_up(scanner: Scanner, hit_limit: bool) -> Transcript:
    """The transcript of the text if it ends here."""
    text = _without_end_of_turn(scanner.text)
    first = scanner.opening[0] if scanner.opening else None
    second = _reviewed(scanner, text, hit_limit)
    reasoning = None
    if scanner.reasoning is not None:
        begin, end = scanner.reasoning
        if end is None:
            end = second.start if second else len(text)
        reasoning = text[begin:end].strip()
    transcript = Transcript(
        text=text,
        first=_content(text, first),
        first_span=first.content if first else None,
        reasoning=reasoning,
        second=_content(text, second),
        second_span=second.content if second else None,
        is_fallback=first is not None and is_fallback(text[slice(*first.content)]),
        outside=_join(text, _loose(scanner, text) + _unclosed(scanner, text)),
    )
    problems = tuple(name for name, occurs in _problems(scanner, transcript, hit_limit) if occurs)
    return replace(transcript, problems=problems)


def _reviewed(scanner: Scanner, text: str, hit_limit: bool) -> Box | None:
    """The box of the reviewed answer."""
    if scanner.closing:
        return scanner.closing[-1]
    if scanner.section == "opening":
        return scanner.opening[-1] if len(scanner.opening) > 1 else None
    if scanner.reasoning_box is not None and not hit_limit and not text[scanner.reasoning_box.end :].strip():
        return scanner.reasoning_box
    return None


def _problems(scanner: Scanner, transcript: Transcript, hit_limit: bool) -> Iterator[tuple[str, bool]]:
    """Every departure from the format, and whether it is one of this text's."""
    tagged = scanner.section != "opening"
    left_open = scanner.open_box is not None and scanner.section != "reasoning"
    second = transcript.second is not None
    answers = [answer for answer in (transcript.first, transcript.second) if answer is not None]
    awaits_second = "opening" in scanner.opened and "closing" not in scanner.opened
    extra = _join(transcript.text, _loose(scanner, transcript.text.removesuffix(scanner.partial_mark)))
    yield "no_box", not scanner.opened - {"reasoning"} and not second
    yield "no_first_box", "opening" not in scanner.opened and ("closing" in scanner.opened or second)
    yield "unterminated_box", left_open or bool(scanner.unclosed)
    yield "empty_box", "" in answers
    yield "repeated_box", len(scanner.opening) > (1 if tagged else 2) or len(scanner.closing) > 1
    yield "no_think", scanner.thinks == 0
    yield "unterminated_think", scanner.section == "reasoning"
    yield "empty_think", transcript.reasoning == ""
    yield "repeated_think", scanner.thinks > 1 or scanner.thinks_ended > 1
    yield "no_second_box", awaits_second and not second and not left_open
    yield "extra_text", bool(extra.strip())
    yield "token_limit", hit_limit


def _loose(scanner: Scanner, text: str) -> list[Span]:
    """The stretches outside boxes and reasoning, to the end of the text."""
    if scanner.section == "reasoning":
        return scanner.loose
    return [*scanner.loose, (scanner.covered, scanner.open_box[0] if scanner.open_box else len(text))]


def _unclosed(scanner: Scanner, text: str) -> list[Span]:
    """Contents of the boxes outside the reasoning that were never closed."""
    if scanner.open_box is None or scanner.section == "reasoning":
        return scanner.unclosed
    return [*scanner.unclosed, (scanner.open_box[1], len(text))]


def _join(text: str, spans: list[Span]) -> str:
    return "".join(text[start:end] for start, end in sorted(spans))


def _content(text: str, box: Box | None) -> str | None:
    """The text in a box, outer white space removed."""
    return None if box is None else text[slice(*box.content)].strip()


def _without_end_of_turn(text: str) -> str:
    while (shorter := text.rstrip()).endswith(_END_OF_TURN):
        text = shorter[: shorter.rindex("<|")]
    return text
