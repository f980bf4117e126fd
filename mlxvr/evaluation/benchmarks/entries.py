"""What a reader yields: a question in the form of `mlxvr.dataset`, and its video."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

__all__ = ["Entry", "Reader", "letter_of", "segments"]


@dataclass(frozen=True)
class Entry:
    """One question as a reader found it.

    Attributes:
        line: "file:line".
        record: the fields of a row, without its media.
        wanted: the video as the release names it.
        video: where it is; None: it is not there.
        problem: why the question cannot be asked, if the reader saw that.
    """

    line: str
    record: dict[str, Any]
    wanted: str
    video: Path | None
    problem: str = ""


Reader = Callable[..., Iterator[Entry]]  # of (folder: Folder, *, subtitles: bool)


def letter_of(answer: str, options: Sequence[str]) -> str:
    """The letter of the option that an answer spells out; the answer itself if it is none of them."""
    plain = [option.strip().casefold() for option in options]
    wanted = answer.strip().casefold()
    return ascii_uppercase[plain.index(wanted)] if wanted in plain[:26] else answer


def segments(value: Any) -> list[list[float]]:
    """Intervals of a release with their ends in order, as the public evaluator puts them; points are left out."""
    pairs = value if value and isinstance(value[0], list | tuple) else [value]
    try:
        found = [sorted((float(start), float(end))) for start, end in pairs]
    except (TypeError, ValueError):
        return []
    return [pair for pair in found if 0 <= pair[0] < pair[1]]
