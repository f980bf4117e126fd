"""Files that are replaced in one step: a stopped run leaves the old file or the new one, never half of one.

This room is the only one that replaces files or appends to them. Whoever writes a file elsewhere gives `replace_file` a
function that fills an open file, or asks `replacing` for a path, where a library insists on opening the file itself.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from mlxvr.errors import ConfigError

__all__ = ["replace_file", "replacing", "sync_folder", "unwritable", "write_synced"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path: Path, *, suffix: str | None = None) -> Iterator[Path]:
    """Yield a path beside `path`; the file that is written there takes the place of `path` at the end.

    The file is on the disk before it gets its name. When the block fails, `path` stays as it was and nothing is left
    beside it. Raises `OSError` when the file cannot be synced or moved.

    Args:
        path: its folder must exist.
        suffix: what the other path ends in, where a library insists on an ending; None: the suffix of `path`.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix if suffix is None else suffix}")
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def replace_file(
    path: Path, write: Callable[[IO[bytes]], object], *, advice: str = "choose another output folder"
) -> None:
    """Replace a file by what `write` puts into an open one; its folder is created when it is not there.

    Raises `ConfigError`, which ends in `advice`, when that fails.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            write(file)
    except OSError as error:
        raise unwritable(path, error, advice=advice) from error


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where its file system can tell."""
    with contextlib.suppress(OSError):
        _sync(folder, os.O_RDONLY)


def unwritable(
    path: Path,
    error: OSError,
    *,
    advice: str = "choose another output folder",
    when_full: str = "free some space and run again",
) -> ConfigError:
    """Return the error to raise for a file that cannot be written; `when_full` is the advice for a full disk."""
    if error.errno in _FULL:
        return ConfigError(f"the disk of {path} is full; {when_full}")
    return ConfigError(f"{path} cannot be written ({error.strerror}); {advice}")


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
