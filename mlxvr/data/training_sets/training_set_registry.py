"""Formats by name, and the one way to read any of them."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxvr.data.rows import Row, load_rows, make_locator, make_row
from mlxvr.data.tables import scan_records
from mlxvr.data.training_sets import moments, multiple_choice, questions
from mlxvr.data.training_sets.columns import LeftOut, Reader, Source
from mlxvr.errors import ConfigError, DataError
from mlxvr.storage.paths import list_visible

__all__ = ["FORMATS", "format_name", "read_rows"]

_OURS = "mlxvr"
_READERS: dict[str, Reader] = {
    "activitynet-tvg": moments.read_moments,
    "charades-sta": moments.read_moments,
    "dapo-math": questions.read_dapo_math,
    "mmr-vbench": multiple_choice.read_mmr_vbench,
    "next-gqa": moments.read_nextgqa,
    "sti-bench": multiple_choice.read_sti_bench,
    "thinklite-vl-hard": questions.read_thinklite,
    "timer1": moments.read_timer1,
    "tvbench": multiple_choice.read_tvbench,
    "video-r1": questions.read_video_r1,
    "virl": questions.read_virl,
}
FORMATS: tuple[str, ...] = (_OURS, *_READERS)

_SUFFIXES = (".json", ".jsonl", ".parquet")


def format_name(text: str) -> str:
    """The format that is meant, as `FORMATS` has it: capitals, `-`, `_` and what follows a clear beginning may differ.

    Raises `ConfigError` if it is none of them, or the beginning of several.
    """
    plain = {re.sub(r"[^a-z0-9]", "", name): name for name in FORMATS}
    wanted = re.sub(r"[^a-z0-9]", "", text.lower())
    found = [wanted] if wanted in plain else [name for name in plain if wanted and name.startswith(wanted)]
    if len(found) != 1:
        raise ConfigError(f"format {text!r} is unknown: use one of {', '.join(FORMATS)}")
    return plain[found[0]]


def read_rows(
    path: str | Path,
    *,
    format: str = _OURS,
    media_root: Path | None = None,
    skip_bad: bool = False,
    labelled: bool = True,
) -> tuple[list[Row], list[str]]:
    """Read a training set.

    Args:
        path: a file: JSONL, or for the formats of others also JSON or parquet (which needs pyarrow); or a folder of
            such files, read in the order of their names.
        format: one of `FORMATS`; see `format_name`.
        media_root: the folder that media paths are relative to; None: that of the file, or `path` if it is a folder.
        skip_bad: whether to leave out rows that cannot be used instead of raising.
        labelled: whether every row needs an answer.

    Returns:
        The rows, and one message for each record that was left out: "file:line: reason" for JSONL, "file: entry n:
        reason" (from 1) for the others. Records that are no part of the mix (several images, other types of problem)
        are left out in any case. An id is the format's name and a digest of the row's own content, so it depends
        neither on the row's place nor on what else is in the file; copies of a row get a number behind it.

    Raises:
        ConfigError: the format is unknown.
        DataError: the file cannot be read or holds no row that can be used; or, without `skip_bad`, a row cannot be.
    """
    name, path = format_name(format), Path(path)
    if name == _OURS:
        bad: list[DataError] | None = [] if skip_bad else None
        rows = load_rows(path, media_root=media_root, labelled=labelled, bad_rows=bad)
        return rows, [str(error) for error in bad or ()]
    rows, left_out = [], []
    copies: dict[str, int] = {}
    for found in _scan(path, name, media_root, labelled):
        if isinstance(found, Row):
            copies[found.id] = copies.get(found.id, 0) + 1
            count = copies[found.id]
            rows.append(found if count == 1 else replace(found, id=f"{found.id}-{count}"))
        elif isinstance(found, DataError) and not skip_bad:
            raise found
        else:
            left_out.append(str(found))
    if not rows:
        told = f": {left_out[0]}" if left_out else ""
        raise DataError(f"{path} holds no row of the format {name} that can be used{told}")
    return rows, left_out


def _scan(path: Path, name: str, media_root: Path | None, labelled: bool) -> Iterator[Row | DataError | LeftOut]:
    """Each row, or why there is none."""
    locate = make_locator(path if path.is_dir() else path.parent, media_root)

    def holds(text: str) -> bool:
        try:
            return locate(text).exists()
        except (DataError, OSError, ValueError):  # no path, or none that the system can look for
            return False

    for file in _files(path):
        source = Source(file.stem, holds)
        for place, record in scan_records(file):
            if isinstance(record, DataError):
                yield record
                continue
            try:
                fields = _READERS[name](record, source)
                yield make_row(_named(name, fields), line=place, locate=locate, labelled=labelled)
            except LeftOut as reason:
                yield LeftOut(f"{place}: {reason}")
            except DataError as error:
                yield error if str(error).startswith(f"{place}: ") else DataError(f"{place}: {error}")


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if path.suffix not in _SUFFIXES:
            raise DataError(f"{path} is not one of {', '.join(_SUFFIXES)}: give the annotation file")
        if not path.exists():
            raise DataError(f"{path} does not exist: check the path")
        return [path]
    found = [file for file in list_visible(path) if file.suffix in _SUFFIXES and file.is_file()]
    if not found:
        raise DataError(f"{path} holds none of {', '.join(f'*{suffix}' for suffix in _SUFFIXES)}: give the annotations")
    return found


def _named(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with an id that only their content decides, and the format as the task."""
    content = json.dumps(fields, sort_keys=True, default=str)
    if "\\ud" in content:  # half of a surrogate pair could not be written to any file
        try:
            json.dumps(fields, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise DataError("a text of the record is not UTF-8: save the file as UTF-8") from None
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return {**fields, "id": f"{name}-{digest}", "task": name}
