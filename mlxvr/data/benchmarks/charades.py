"""Charades-STA, test: 3,720 descriptions of moments in videos of half a minute.

Files, either of
    charades_sta_test.txt         the authors': `3MSZA 24.3 30.4##person turn a light on.`
    data/test-*.parquet           `lmms-lab/charades_sta`, for lmms-eval's `temporal_grounding_charades`:
                                  video (3MSZA.mp4), caption, timestamp [start, end]
    test.json, charades_test.json a list of records with `description`, `timestamps` and `video`, as in
                                  VideoAuto-R1's data
and the videos of Charades, `Charades_v1_480/<id>.mp4` (or Charades_v1/, videos/).

Rows are numbered in the order of the file: ids are `<video>-<number>`. Swapped ends are put in order; moments without
length are skipped.
"""

import re
from collections.abc import Iterator

from mlxvr.data.benchmarks.entries import Entry
from mlxvr.data.benchmarks.files import Folder
from mlxvr.data.benchmarks.grounding import grounding_entry, read_columns

__all__ = ["read"]

_VIDEOS = ("Charades_v1_480", "Charades_v1", "videos", "rgb_videos_30fps_480", ".")
_PATTERNS = (
    "charades_sta_test.txt",
    "*/charades_sta_test.txt",
    "data/test-*.parquet",
    "test-*.parquet",
    "test.json",
    "charades_test.json",
)
_LINE = re.compile(r"(\S+)\s+([\d.]+)\s+([\d.]+)\s*##(.*)")


def read(folder: Folder, *, subtitles: bool) -> Iterator[Entry]:
    """Yield the descriptions."""
    number = 0
    for path in folder.files(*_PATTERNS):
        for line, record in folder.table(path):
            number += 1
            if path.suffix != ".txt":
                moment = read_columns(record)
            elif parts := _LINE.fullmatch(record["text"]):
                moment = parts[4], [parts[2], parts[3]], f"{parts[1]}.mp4"
            else:
                yield Entry(line, {}, "", None, "the line is not `video start end##description`")
                continue
            identity = f"{moment[2].removesuffix('.mp4')}-{number}"
            yield grounding_entry(line, identity, moment, folder, _VIDEOS)
