"""Read tables that others have written, in parquet, JSON, JSONL or CSV, and the values of their columns.

Benchmarks and training sets are released in any of these formats. A record read here is not yet a row: the reader of
its format knows the meaning of each column, and `mlxvr.data.rows` checks the row that it makes.
"""

import ast
import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxvr.data.jsonl import parse_line, read_lines
from mlxvr.errors import DataError

__all__ = ["as_list", "as_text", "load_file", "read_records", "scan_records", "segments"]


def read_records(path: Path) -> list[Any]:
    """Return all records of a table file; of a JSON object its values, each with its name as `key`.

    Raises `DataError`: the file is damaged, or it is parquet and pyarrow is not installed.
    """
    content = _read_parquet(path) if path.suffix == ".parquet" else load_file(path)
    if isinstance(content, Mapping):
        return [{"key": key, **value} if isinstance(value, Mapping) else value for key, value in content.items()]
    if not isinstance(content, list):
        raise DataError(f"{path} holds a {type(content).__name__}: expected a list of records")
    return content


def scan_records(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    """Yield each record of a table file, or its error, with its place.

    A place is "file:line" in JSONL, and "file: entry n" in other formats, both from 1. Raises the same as
    `read_records`.
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
    """Read a JSON, JSONL, CSV or text file; raises `DataError` if it is damaged."""
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
    """Return the value of a column of lists, stored as a list or as Python text; [] if it is neither."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return []
    return list(value) if isinstance(value, list | tuple) else []


def as_text(value: Any) -> str:
    """Return the value of a column of names, stored as numbers or texts, as stripped text."""
    return "" if value is None else str(value).strip()


def segments(value: Any) -> list[list[float]]:
    """Return the intervals of a column, their ends in order as in the public evaluator, without points."""
    pairs = value if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple) else [value]
    try:
        intervals = [sorted((float(start), float(end))) for start, end in pairs]
    except (TypeError, ValueError, OverflowError):
        return []
    return [interval for interval in intervals if 0 <= interval[0] < interval[1]]


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
