"""The formats of training sets by name, and the function that reads any of them."""

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
from mlxvr.data.training_sets.columns import LeftOut, RecordReader, Source
from mlxvr.errors import ConfigError, DataError
from mlxvr.storage.paths import list_visible

__all__ = ["FORMATS", "format_name", "read_rows"]

_OURS = "mlxvr"
_READERS: dict[str, RecordReader] = {
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
    """Return the name in `FORMATS` that a text means; case, `-` and `_` are ignored, and a unique prefix is enough.

    Raises `ConfigError` if it is the prefix of no name, or of several.
    """
    by_plain_name = {re.sub(r"[^a-z0-9]", "", name): name for name in FORMATS}
    wanted = re.sub(r"[^a-z0-9]", "", text.lower())
    matches = [plain for plain in by_plain_name if wanted and plain.startswith(wanted)]
    if wanted in by_plain_name:
        matches = [wanted]
    if len(matches) != 1:
        raise ConfigError(f"format {text!r} is unknown: use one of {', '.join(FORMATS)}")
    return by_plain_name[matches[0]]


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
        path: a JSONL file; for formats other than mlxvr's also a JSON or parquet file (parquet needs pyarrow), or a
            folder of such files, which are read in the order of their names.
        format: one of `FORMATS`; see `format_name`.
        media_root: the folder that media paths are relative to; None: that of the file, or `path` if it is a folder.
        skip_bad: whether to leave out rows that cannot be used instead of raising.
        labelled: whether every row needs an answer.

    Returns:
        The rows, and one message for each record that was left out: "file:line: reason" for JSONL, "file: entry n:
        reason" (from 1) for the other formats. Records that do not belong to the mix (several images, other types of
        problem) are always left out. An id is the format's name and a digest of the row's content, so it does not
        depend on the row's place or on the rest of the file; copies of a row get a number appended.

    Raises:
        ConfigError: the format is unknown.
        DataError: the file cannot be read or holds no usable row; or, without `skip_bad`, a row cannot be used.
    """
    name, path = format_name(format), Path(path)
    if name == _OURS:
        bad: list[DataError] | None = [] if skip_bad else None
        rows = load_rows(path, media_root=media_root, labelled=labelled, bad_rows=bad)
        return rows, [str(error) for error in bad or ()]
    rows, left_out = [], []
    copies: dict[str, int] = {}
    for result in _scan(path, name, media_root, labelled):
        if isinstance(result, Row):
            copies[result.id] = copies.get(result.id, 0) + 1
            count = copies[result.id]
            rows.append(result if count == 1 else replace(result, id=f"{result.id}-{count}"))
        elif isinstance(result, DataError) and not skip_bad:
            raise result
        else:
            left_out.append(str(result))
    if not rows:
        reason = f": {left_out[0]}" if left_out else ""
        raise DataError(f"{path} holds no row of the format {name} that can be used{reason}")
    return rows, left_out


def _scan(path: Path, name: str, media_root: Path | None, labelled: bool) -> Iterator[Row | DataError | LeftOut]:
    """Yield each record's row, or the reason why it has none."""
    locate = make_locator(path if path.is_dir() else path.parent, media_root)

    def holds(text: str) -> bool:
        try:
            return locate(text).exists()
        except (DataError, OSError, ValueError):  # a forbidden path, or one that the system cannot look up
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
    files = [file for file in list_visible(path) if file.suffix in _SUFFIXES and file.is_file()]
    if not files:
        raise DataError(f"{path} holds none of {', '.join(f'*{suffix}' for suffix in _SUFFIXES)}: give the annotations")
    return files


def _named(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with an id that depends on their content alone, and with the format as the task."""
    content = json.dumps(fields, sort_keys=True, default=str)
    if "\\ud" in content:  # half of a surrogate pair could not be written to any file
        try:
            json.dumps(fields, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise DataError("a text of the record is not UTF-8: save the file as UTF-8") from None
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return {**fields, "id": f"{name}-{digest}", "task": name}
