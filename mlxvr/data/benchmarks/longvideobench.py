"""LongVideoBench, validation: 1,337 questions about videos of up to an hour, many of which refer to the subtitles.

Files, as `longvideobench/LongVideoBench` has them and lmms-eval's `longvideobench_val_v` task reads them:

    lvb_val.json (or validation-00000-of-00001.parquet)
        id, video_path, subtitle_path, question, option0 .. option4 ("N/A": none) or candidates (a list),
        correct_choice (from 0), duration (seconds), duration_group (15, 60, 600, 3600), question_category,
        starting_timestamp_for_subtitles
    videos/<video_path>           from videos.tar.part.*
    subtitles/<subtitle_path>     from subtitles.tar

`task` is the question category, `category` the duration group. The answers of the test split are not public.

Subtitles depart from the public `longvideobench_val_i`, which sends single images with the lines spoken between them.
These models take a video as one block, so the lines are put before the question, as for Video-MME.
"""

from collections.abc import Iterator
from string import ascii_uppercase
from typing import Any

from mlxvr.data.benchmarks.entries import Entry
from mlxvr.data.benchmarks.files import Folder
from mlxvr.data.benchmarks.subtitles import NO_SUBTITLES, read_timed_lines
from mlxvr.data.tables import as_list, as_text

__all__ = ["read"]

_VIDEOS = ("videos", ".")


def read(folder: Folder, *, subtitles: bool) -> Iterator[Entry]:
    """Yield the questions."""
    for path in folder.files("lvb_val.json", "validation-*.parquet", "data/validation-*.parquet"):
        for line, record in folder.table(path):
            choice = record.get("correct_choice")
            row = {
                "id": record.get("id"),
                "question": record.get("question"),
                "options": _options(record),
                "answer": ascii_uppercase[choice] if isinstance(choice, int) and 0 <= choice < 26 else choice,
                "task": record.get("question_category"),
                "category": as_text(record.get("duration_group")),
            }
            if subtitles:
                file = folder.find(as_text(record.get("subtitle_path")), ("subtitles",))
                start, duration = record.get("starting_timestamp_for_subtitles"), record.get("duration")
                text = read_timed_lines(file, float(start or 0), float(duration or "inf")) if file else ""
                row["subtitles"] = text or NO_SUBTITLES
            video = as_text(record.get("video_path"))
            yield Entry(line, row, video, folder.find(video, _VIDEOS))


def _options(record: dict[str, Any]) -> list[str]:
    """Return the choices, without those that are "N/A", which come last."""
    listed = as_list(record.get("candidates")) or [record.get(f"option{number}") for number in range(5)]
    return [str(option) for option in listed if option not in (None, "N/A")]
