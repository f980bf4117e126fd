"""Records of files that others have written: tables in parquet, JSON, JSONL or CSV, and what their columns hold.

Benchmarks and training sets are released in whichever of these their authors liked. What is read here is not yet a row:
the readers know which column means what, and `mlxvr.data.rows` checks what they make of it.
"""

import ast
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mlxvr.data.rows import parse_line, read_lines
from mlxvr.errors import DataError

__all__ = ["as_list", "as_text", "letter_of", "load_file", "read_records", "scan_records", "segments"]


def read_records(path: Path) -> list[Any]:
    """All records of a table file; of a JSON object its values, each with its name as `key`.

    Raises `DataError`: the file is damaged, or parquet cannot be read for want of pyarrow.
    """
    content = _read_parquet(path) if path.suffix == ".parquet" else load_file(path)
    if isinstance(content, Mapping):
        return [{"key": key, **value} if isinstance(value, Mapping) else value for key, value in content.items()]
    if not isinstance(content, list):
        raise DataError(f"{path} holds a {type(content).__name__}: expected a list of records")
    return content


def scan_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    """Yield each record of a table file with its place, or what is wrong with it.

    A place is "file:line" in JSONL, and "file: entry n" elsewhere, from 1. Raises `DataError`: see `read_records`.
    """
    if path.suffix == ".jsonl":
        for number, raw in enumerate(read_lines(path), start=1):
            if raw.strip():
                line = f"{path}:{number}"
                try:
                    yield line, parse_line(raw, line)
                except DataError as error:
                    yield line, error
        return
    for number, record in enumerate(read_records(path), start=1):
        place = f"{path}: entry {number}"
        if isinstance(record, Mapping):
            yield place, record
        else:
            yield place, DataError(f"{place}: a {type(record).__name__}: expected an object with the row's fields")


def load_file(path: Path) -> Any:
    """What a JSON, JSONL, CSV or text file holds; raises `DataError` if it is damaged."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            if path.suffix == ".jsonl":
                return [json.loads(line) for line in file if line.strip()]
            if path.suffix == ".txt":
                return [{"text": line.rstrip("\r\n")} for line in file if line.strip()]
            return json.load(file)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({_first_line(error)}): download it again") from error


def as_list(value: Any) -> list[Any]:
    """A column that holds a list, in whichever way it was stored: as such, or written out."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return []
    return list(value) if isinstance(value, list | tuple) else []


def as_text(value: Any) -> str:
    """A column that names something, a number or a text, as text without outer space."""
    return "" if value is None else str(value).strip()


def letter_of(answer: str, options: Sequence[str]) -> str:
    """The letter of the option that an answer spells out; the answer itself if it is none of them."""
    plain = [option.strip().casefold() for option in options]
    wanted = answer.strip().casefold()
    return ascii_uppercase[plain.index(wanted)] if wanted in plain[:26] else answer


def segments(value: Any) -> list[list[float]]:
    """Intervals of a release with their ends in order, as the public evaluator puts them; points are left out."""
    pairs = value if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple) else [value]
    try:
        found = [sorted((float(start), float(end))) for start, end in pairs]
    except (TypeError, ValueError, OverflowError):
        return []
    return [pair for pair in found if 0 <= pair[0] < pair[1]]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} needs the package pyarrow to be read: install it with `pip install pyarrow`"
        ) from error
    try:
        return parquet.read_table(path, partitioning=None).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({_first_line(error)}): download it again") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:120] or type(error).__name__
