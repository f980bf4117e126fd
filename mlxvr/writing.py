"""Files that are replaced in one step: a stopped run leaves the old one or the new one, never half of one."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from mlxvr.errors import ConfigError

__all__ = ["replace_file"]


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
        raise ConfigError(f"{path} cannot be written ({error.strerror}); {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
