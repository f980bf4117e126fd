"""Files that are replaced in one step: a stopped run leaves the old one or the new one, never half of one."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mlxvr.errors import ConfigError

__all__ = ["replace_file", "unwritable"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def replace_file(
    path: Path, write: Callable[[IO[bytes]], object], *, advice: str = "choose another output folder"
) -> None:
    """Write a file beside its place and move it there; raises `ConfigError`, with `advice`, if that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error, advice=advice) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def unwritable(
    path: Path,
    error: OSError,
    *,
    advice: str = "choose another output folder",
    when_full: str = "free some space and run again",
) -> ConfigError:
    """The error to raise for a file that cannot be written: a full disk asks for something else than a wrong path."""
    if error.errno in _FULL:
        return ConfigError(f"the disk of {path} is full; {when_full}")
    return ConfigError(f"{path} cannot be written ({error.strerror}); {advice}")
