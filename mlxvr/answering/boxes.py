r"""Finding boxes and ``<think>`` tags in text that arrives in pieces.

The scanner makes one pass and remembers a few characters beside the text. A piece may end within ``\boxed{``,
``<think>`` or ``</think>``, so an ending that may be the beginning of one of them waits for the next piece. Everything
else is settled at once, closing braces included. This module collects positions; `mlxvr.answering.transcript` explains
which box is which answer.
"""

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["Box", "Scanner", "Section", "Span"]

Section = Literal["opening", "reasoning", "closing"]
Span = tuple[int, int]  # characters [start, end)

_BOX, _THINK, _END_THINK = "\\boxed{", "<think>", "</think>"
_MARKS = re.compile(r"\\boxed\{|<think>|</think>|[{}]")
_PARTIAL_MARKS = frozenset(mark[:size] for mark in (_BOX, _THINK, _END_THINK) for size in range(1, len(mark)))
_LONGEST_PARTIAL = max(map(len, _PARTIAL_MARKS))


@dataclass(frozen=True)
class Box:
    r"""A closed box: ``\boxed{`` starts at `start`, its brace ends at `end`, `content` is the text between."""

    start: int
    content: Span
    end: int


class Scanner:
    """Reads text piece by piece and records the positions of boxes and tags.

    Attributes:
        section: the part that the text is in: before, within or after the reasoning.
        opening: boxes closed before any tag.
        closing: boxes closed after the last ``</think>``.
        reasoning_box: the last box closed within the reasoning.
        open_box: where the open box and its content start.
        unclosed: contents of boxes outside the reasoning that a tag cut off.
        opened: the sections in which a box was opened.
        reasoning: where the reasoning starts and, once there was a ``</think>``, where it ends.
        thinks, thinks_ended: how many tags of each kind there were.
        loose: the stretches outside boxes and reasoning, up to `covered`.
        partial_mark: the end of the text, if it may be the beginning of a mark.
    """

    def __init__(self) -> None:
        self.section: Section = "opening"
        self.opening: list[Box] = []
        self.closing: list[Box] = []
        self.reasoning_box: Box | None = None
        self.open_box: tuple[int, int] | None = None
        self.unclosed: list[Span] = []
        self.opened: set[Section] = set()
        self.reasoning: tuple[int, int | None] | None = None
        self.thinks = 0
        self.thinks_ended = 0
        self.loose: list[Span] = []
        self.covered = 0
        self.partial_mark = ""
        self._partial_at = 0
        self._depth = 0
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Everything that was read."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def text_from(self, start: int, end: int | None = None) -> str:
        """The text in [start, end), without an ending that may begin a mark; the cost is that of what is returned."""
        stop = self._partial_at if end is None else end
        pieces: list[str] = []
        at = self._partial_at + len(self.partial_mark)
        for piece in reversed(self._pieces):
            if at <= start:
                break
            at -= len(piece)
            pieces.append(piece)
        return "".join(reversed(pieces))[max(0, start - at) : max(0, stop - at)]

    def feed(self, piece: str) -> None:
        """Read the next piece."""
        if not piece:
            return
        self._pieces.append(piece)
        text, offset, read = self.partial_mark + piece, self._partial_at, 0
        for match in _MARKS.finditer(text):
            read = match.end()
            self._meet(match.group(), offset + match.start(), offset + read)
        longest = min(_LONGEST_PARTIAL, len(text) - read)
        size = next((size for size in range(longest, 0, -1) if text[-size:] in _PARTIAL_MARKS), 0)
        self.partial_mark = text[len(text) - size :]
        self._partial_at = offset + len(text) - size

    def _meet(self, mark: str, start: int, end: int) -> None:
        """Process the mark at [start, end)."""
        if mark == _THINK:
            self._begin_reasoning(start, end)
        elif mark == _END_THINK:
            self._end_reasoning(start, end)
        elif self.open_box is None:
            if mark == _BOX:
                self.open_box, self._depth = (start, end), 1
                self.opened.add(self.section)
        elif mark == "}":
            self._depth -= 1
            if self._depth == 0:
                self._close_box(self.open_box, start, end)
        else:
            self._depth += 1

    def _close_box(self, opened: tuple[int, int], start: int, end: int) -> None:
        box = Box(opened[0], (opened[1], start), end)
        self.open_box = None
        if self.section == "reasoning":
            self.reasoning_box = box
            return
        (self.opening if self.section == "opening" else self.closing).append(box)
        self._cover(box.start, end)

    def _begin_reasoning(self, start: int, end: int) -> None:
        self._cut_box(start)
        self.thinks += 1
        if self.section != "reasoning":
            self._cover(start, end)
            self.section = "reasoning"
        if self.reasoning is None:
            self.reasoning = (end, None)

    def _end_reasoning(self, start: int, end: int) -> None:
        self._cut_box(start)
        self.thinks_ended += 1
        self.reasoning = (self.covered if self.reasoning is None else self.reasoning[0], start)
        self.covered = end
        self.closing.clear()
        self.opened.discard("closing")
        self.section = "closing"

    def _cut_box(self, end: int) -> None:
        """Drop the open box, since a tag ends its section; outside the reasoning, record it as unclosed."""
        if self.open_box is not None and self.section != "reasoning":
            self.unclosed.append((self.open_box[1], end))
            self._cover(self.open_box[0], end)
        self.open_box = None

    def _cover(self, start: int, end: int) -> None:
        """Record that [start, end) is a box or a tag; the text before it is loose."""
        self.loose.append((self.covered, start))
        self.covered = end
