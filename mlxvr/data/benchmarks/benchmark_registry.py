"""The benchmarks by name, and the function that reads any of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxvr.data.benchmarks import (
    activitynet,
    charades,
    longvideobench,
    mmvu,
    mvbench,
    mvp,
    nextgqa,
    videomme,
    videommmu,
)
from mlxvr.data.benchmarks.benchmark import Benchmark
from mlxvr.data.benchmarks.entries import Entry, EntryReader
from mlxvr.data.benchmarks.files import Folder
from mlxvr.data.rows import Row, make_row
from mlxvr.errors import ConfigError, DataError

__all__ = ["BENCHMARKS", "Preset", "read_benchmark"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How a benchmark is read."""

    title: str
    read: EntryReader
    has_subtitles: bool = False


BENCHMARKS: dict[str, Preset] = {
    "activitynet": Preset(title="ActivityNet grounding", read=activitynet.read),
    "charades": Preset(title="Charades-STA", read=charades.read),
    "longvideobench": Preset(title="LongVideoBench (validation)", read=longvideobench.read, has_subtitles=True),
    "mmvu": Preset(title="MMVU (validation, multiple choice)", read=mmvu.read),
    "mvbench": Preset(title="MVBench", read=mvbench.read),
    "mvp": Preset(title="MVP (mini)", read=partial(mvp.read, split="mini")),
    "mvp_full": Preset(title="MVP (full)", read=partial(mvp.read, split="full")),
    "nextgqa": Preset(title="NExT-GQA (test)", read=nextgqa.read),
    "videomme": Preset(title="Video-MME", read=videomme.read, has_subtitles=True),
    "videommmu": Preset(title="VideoMMMU", read=videommmu.read),
}


def read_benchmark(name: str, root: str | Path, *, subtitles: bool = False) -> Benchmark:
    """Read a benchmark from the files of its release.

    Args:
        name: one of `BENCHMARKS`.
        root: the folder that holds the annotations and the videos.
        subtitles: whether a video's subtitles are put before its questions.

    Raises:
        ConfigError: the name is unknown, or the benchmark has no subtitles.
        DataError: the annotations are missing or damaged, all videos are missing, or an id occurs twice.
    """
    preset = BENCHMARKS.get(name)
    if preset is None:
        raise ConfigError(f"benchmark {name!r} is unknown: choose from {', '.join(sorted(BENCHMARKS))}")
    if subtitles and not preset.has_subtitles:
        with_subtitles = sorted(key for key, value in BENCHMARKS.items() if value.has_subtitles)
        raise ConfigError(
            f"{preset.title} has no subtitles: leave out --subtitles (subtitles=True); {' and '.join(with_subtitles)} "
            "have them"
        )
    folder = Folder(Path(root), preset.title)
    rows: dict[str, Row] = {}
    missing: dict[str, int] = {}
    skipped = []
    for entry, row in _make_rows(preset.read(folder, subtitles=subtitles), folder):
        if isinstance(row, str):
            skipped.append(f"{entry.line}: {row}")
        elif entry.video is None:
            missing[entry.video_name] = missing.get(entry.video_name, 0) + 1
        elif row.id in rows:
            raise DataError(f"{entry.line}: {rows[row.id].line} has the id {row.id!r} too: keep one copy")
        else:
            rows[row.id] = row
    benchmark = Benchmark(
        name=name,
        rows=tuple(rows.values()),
        missing=tuple(missing),
        missing_rows=sum(missing.values()),
        skipped=tuple(skipped),
    )
    if not rows:
        raise DataError(f"{root} holds nothing of {preset.title} that can be evaluated: {benchmark.describe()}")
    return benchmark


def _make_rows(entries: Iterator[Entry], folder: Folder) -> Iterator[tuple[Entry, Row | str]]:
    """Yield each entry with its row, or with the reason why it has none."""
    for entry in entries:
        if entry.problem:
            yield entry, entry.problem
            continue
        video = entry.video.relative_to(folder.root).as_posix() if entry.video else "missing"
        record: dict[str, Any] = {**entry.record, "video": video}
        try:
            yield entry, make_row(record, line=entry.line, locate=folder.root.joinpath)
        except DataError as error:
            yield entry, str(error).removeprefix(f"{entry.line}: ")
