"""A folder that appears whole or not at all.

The files are written into a hidden folder beside the target, on the same disk, which is renamed when all of them are
on the disk. A process that dies half-way (kill -9, power) leaves that hidden folder behind; it has one fixed name per
target, so the next run finds it and sees by its lock that no process works in it. If the next run would write the same
bytes, it reuses the finished shards; else it clears the folder.
"""

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.storage.atomic import sync_folder, write_synced
from mlxvr.storage.paths import list_all, list_visible

__all__ = ["check_target", "staged"]

_PLAN = ".plan"  # in the hidden folder: what is being written there
_log = logging.getLogger(__name__)


def check_target(target: Path, source: Path | None = None, *, force: bool = False) -> Path:
    """Return the real path of a folder that may be written; raises `ConfigError` when it must not be.

    A target that holds files is only accepted with `force`, and only if it is a model folder, so that a slip of
    the keyboard cannot replace a home directory.
    """
    target = Path(os.path.realpath(target.expanduser()))
    if source is not None:
        origin = Path(os.path.realpath(source))
        if origin == target or origin.is_relative_to(target):
            raise ConfigError(f"the output {target} is or holds the source {origin}; choose another folder")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"the output {target} is a file; expected a folder that does not exist yet")
    if target.is_dir() and list_visible(target):
        if not (target / "config.json").is_file():
            raise ConfigError(
                f"the output {target} is not empty, and no model folder that could be replaced; choose another folder"
            )
        if not force:
            raise ConfigError(f"the output {target} is not empty; choose another folder, or --force to replace it")
    return target


@contextmanager
def staged(target: Path, plan: str) -> Iterator[Path]:
    """Yield a folder that becomes `target` when the block ends well.

    Args:
        target: from `check_target`; a folder that lies there is replaced.
        plan: identifies the bytes to write; the folder holds the finished shards of an interrupted run with that plan.

    When the block fails, finished shards stay for the next run, unless the source is damaged (`CheckpointError`).
    Raises `ConfigError` when another process is writing the same target, or when it cannot be written at all.
    """
    folder = target.with_name(f".{target.name}.mlxvr-partial")
    aside = target.with_name(f".{target.name}.mlxvr-replaced")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(folder)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; choose another folder") from error
    try:
        _recover(target, aside)
        _clear(folder, keep=_finished(folder, plan))
        write_synced(folder / _PLAN, plan.encode())
        yield folder
        (folder / _PLAN).unlink()
        sync_folder(folder)
        if target.is_dir():
            target.rename(aside)
        folder.rename(target)
        sync_folder(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException as error:
        shards = set() if isinstance(error, CheckpointError) or not folder.is_dir() else _finished(folder, plan)
        if shards:
            _log.warning("%d finished shards wait in %s: run again to go on, or remove it", len(shards), folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        _recover(target, aside)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(f"the disk of {target} is full; free some space and run again") from error
        raise
    finally:
        os.close(lock)


def _claim(folder: Path) -> int:
    """Create or take over the hidden folder; returns the descriptor that holds its lock."""
    while True:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.is_dir() and folder.stat().st_ino == os.fstat(lock).st_ino:
                return lock  # ours, and not renamed by its last owner in the meantime
        except BlockingIOError as error:
            os.close(lock)
            raise ConfigError(f"another process is writing {folder}; wait for it or stop it") from error
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _recover(target: Path, aside: Path) -> None:
    """Undo the one gap in replacing a folder: the old one moved aside, the new one not yet in place."""
    if aside.is_dir() and not target.exists():
        aside.rename(target)
    elif aside.is_dir():
        shutil.rmtree(aside)


def _finished(folder: Path, plan: str) -> set[str]:
    """Return the names of the shards that a run with the same plan has finished."""
    plan_file = folder / _PLAN
    if not plan_file.is_file() or plan_file.read_text(encoding="utf-8") != plan:
        return set()
    return {file.name for file in list_visible(folder, "*.safetensors")}


def _clear(folder: Path, *, keep: set[str]) -> None:
    for entry in list_all(folder):
        if entry.name in keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
