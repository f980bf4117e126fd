"""Read subtitles as lines of text, in the order in which they are spoken."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxvr.errors import DataError

__all__ = ["NO_SUBTITLES", "read_srt", "read_timed_lines"]

NO_SUBTITLES = "No subtitles available"  # Video-MME's own words

_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")


def read_srt(path: Path) -> str:
    """Return the text of a SubRip file, without numbers, times and tags; bytes that are not UTF-8 are replaced."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    lines = []
    for block in re.split(r"\n\s*\n", text):
        _, arrow, after = block.partition("-->")
        if arrow:
            lines.append(" ".join(_TAG.sub("", after.partition("\n")[2]).split()))
    return "\n".join(filter(None, lines))


def read_timed_lines(path: Path, start: float, duration: float) -> str:
    """Return the text of LongVideoBench's JSON subtitles that is spoken within a clip.

    Args:
        path: a list of {"start": "00:00:01.000", "end", "line"} or {"timestamp": [s, e], "text"}.
        start: the time at which the clip begins, in seconds on the subtitles' clock.
        duration: the length of the clip in seconds.

    Raises `DataError` if the file has neither form.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
        lines = [_timed(record, start, duration) for record in records]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not a list of timed subtitles: download it again") from error
    return "\n".join(text for first, last, text in lines if text and last >= 0 and first <= duration)


def _timed(record: Mapping[str, Any], start: float, duration: float) -> tuple[float, float, str]:
    """Return (start, end, text) of a line, in seconds from the clip's start."""
    if "timestamp" in record:
        first, last = record["timestamp"]
        last = start + duration if last is None else last  # the last line of a clip may have no end
    else:
        first, last = _seconds(record["start"]), _seconds(record["end"])
    text = record["text"] if "timestamp" in record else record["line"]
    return float(first) - start, float(last) - start, " ".join(str(text).split())


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))
