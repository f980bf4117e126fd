"""Entries of temporal grounding: a description, its interval and a video."""

from typing import Any

from mlxvr.data.benchmarks.entries import Entry
from mlxvr.data.benchmarks.files import Folder
from mlxvr.data.tables import as_list, as_text, segments

__all__ = ["grounding_entry", "read_columns"]


def grounding_entry(
    line: str, identity: str, moment: tuple[str, Any, str], folder: Folder, videos: tuple[str, ...]
) -> Entry:
    """Make an entry of a (description, interval, video), whose file is looked for in the folders `videos`.

    An interval without length is a problem, since nothing can overlap it.
    """
    text, interval, video = moment
    intervals = segments(interval)
    row = {"id": identity, "question": " ".join(text.split()), "answer": intervals, "kind": "iou"}
    problem = "" if intervals else f"the interval is {interval!r}: nothing can overlap it"
    return Entry(line, row, video, folder.find(video, videos), problem)


def read_columns(record: dict[str, Any]) -> tuple[str, Any, str]:
    """Return a record's (description, interval, video), from the Hub's columns or those of VideoAuto-R1's files."""
    text = next((record[key] for key in ("caption", "description", "sentence") if record.get(key)), None)
    interval = next((record[key] for key in ("timestamp", "timestamps") if record.get(key) is not None), None)
    return as_text(text), as_list(interval), as_text(record.get("video"))
