"""What a reader yields: a question in the form of `mlxvr.data.rows`, and its video."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Entry", "Reader"]


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
