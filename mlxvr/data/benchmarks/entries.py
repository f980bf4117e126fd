"""The entries that a benchmark's reader yields: a question in the form of `mlxvr.data.rows`, and its video."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Entry", "EntryReader"]


@dataclass(frozen=True)
class Entry:
    """One question of a release.

    Attributes:
        line: "file:line".
        record: the fields of a row, without its media.
        video_name: the video's name in the release.
        video: the video's file; None: it is missing.
        problem: why the question cannot be asked; "" if the reader noticed no reason.
    """

    line: str
    record: dict[str, Any]
    video_name: str
    video: Path | None
    problem: str = ""


EntryReader = Callable[..., Iterator[Entry]]  # of (folder: Folder, *, subtitles: bool)
