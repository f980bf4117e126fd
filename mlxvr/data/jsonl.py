"""Read JSONL files line by line, and quote values in errors."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxvr.errors import DataError

__all__ = ["parse_line", "read_lines", "show_value"]


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file as they are on disk; raises `DataError` if it cannot be read."""
    if path.is_dir():
        raise DataError(f"{path} is a folder: give a JSONL file with one question per line")
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def parse_line(raw: bytes, line: str) -> Mapping[str, Any]:
    """Parse a line as a JSON object; raises `DataError`, beginning with `line` ("file:line"), if it is not one."""
    try:
        text = raw.decode("utf-8-sig")
        record = json.loads(text)
        if "\\ud" in text.lower():  # an escaped half of a surrogate pair could not be written to any file
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeError:
        raise DataError(f"{line}: the line is not UTF-8: save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it nests too deep or has too long a number"
        raise DataError(f"{line}: the line is not JSON ({reason}): write one JSON object per line") from None
    if not isinstance(record, dict):
        raise DataError(f"{line}: the line holds {show_value(record)}: expected a JSON object, {{...}}")
    return record


def show_value(value: Any) -> str:
    """Return a value's representation for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
