"""ActivityNet grounding: descriptions of moments in videos of two minutes, from ActivityNet Captions.

Files, either of
    val_2.json                    ActivityNet Captions' own, also in captions/ or activitynet_captions/:
                                  {"v_<id>": {"duration", "timestamps": [[start, end], ..], "sentences": [..]}, ..}
                                  Others, such as VideoMind, test grounding on this file.
    data/test-*.parquet, test.json
                                  video, caption, timestamp (or description, timestamps), one moment per record
and the videos, `videos/v_<id>.mp4` (or .mkv, .webm).

It is not known which list the paper used: its figure may rest on a part of this one. Ids are `v_<id>-<number>`, where
the number counts the moments of a video. Swapped ends are put in order; moments without length are skipped.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from mlxvr.data.benchmarks.entries import Entry
from mlxvr.data.benchmarks.files import Folder
from mlxvr.data.benchmarks.grounding import grounding_entry, read_columns
from mlxvr.data.tables import as_text

__all__ = ["read"]

_VIDEOS = ("videos", "rgb_videos_15fps_short256", "videos_3fps_480_noaudio", ".")
_PATTERNS = (
    "val_2.json",
    "captions/val_2.json",
    "activitynet_captions/val_2.json",
    "data/test-*.parquet",
    "test-*.parquet",
    "test.json",
)


def read(folder: Folder, *, subtitles: bool) -> Iterator[Entry]:
    """Yield the descriptions."""
    moments: Counter[str] = Counter()
    for path in folder.files(*_PATTERNS):
        for line, record in folder.table(path):
            for moment in _moments(record):
                video = moment[2]
                moments[video] += 1
                name = video.rpartition("/")[2].rpartition(".")[0] or video
                yield grounding_entry(line, f"{name}-{moments[video]}", moment, folder, _VIDEOS)


def _moments(record: dict[str, Any]) -> list[tuple[str, Any, str]]:
    if "sentences" not in record:
        return [read_columns(record)]
    texts, intervals = record["sentences"], record.get("timestamps") or []
    return [(as_text(text), interval, record["key"]) for text, interval in zip(texts, intervals)]
