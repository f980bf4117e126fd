"""SHA-256 of large files, computed once.

A weights file is identified by its content. The Hub's cache names each of its blobs by that hash, so blobs need not be
read. Other files are read once, several at a time. The hash of a large file that has not just been written is stored in
the user's cache folder (`$XDG_CACHE_HOME/mlxvr/sha256`, `~/.cache` by default) under the file's path, size, time of
change and inode, and never beside the weights, whose folder may be read-only. Where the cache folder cannot be written,
files are read again.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.storage.atomic import replace_file

__all__ = ["FileStamp", "hash_file", "hash_files", "stamp_of"]

FileStamp = tuple[str, int, int, int]  # path, size, time of change in ns, inode

_WORTH_STORING = 64_000_000  # bytes; less is read in a few hundredths of a second
_SETTLED_NS = 2_000_000_000  # a file that changed later than this may change again within the clock's resolution
_READERS = 4
_BLOB = re.compile(r"[0-9a-f]{64}")


def stamp_of(file: Path) -> FileStamp:
    """Return what changes when a file is written to or replaced."""
    real = file.resolve()
    stat = real.stat()
    return str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino


def hash_files(files: Iterable[Path]) -> dict[Path, str]:
    """File -> SHA-256 of its bytes, in hexadecimal digits; see `hash_file`."""
    wanted = list(files)
    with ThreadPoolExecutor(_READERS) as readers:
        return dict(zip(wanted, readers.map(hash_file, wanted), strict=True))


def hash_file(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits.

    Raises `CheckpointError` when the file cannot be read or changes while it is.
    """
    try:
        stamp = stamp_of(file)
        real = Path(stamp[0])
        if real.parent.name == "blobs" and _BLOB.fullmatch(real.name):
            return real.name
        note = _note_of(stamp)
        with contextlib.suppress(OSError, ValueError):
            known = note.read_text(encoding="ascii")
            if _BLOB.fullmatch(known):
                return known
        with real.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if stamp_of(file) != stamp:
            raise CheckpointError(f"{file} changed while it was read: wait until it is written, then try again")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}): download or copy it again") from error
    if stamp[1] >= _WORTH_STORING and time.time_ns() - stamp[2] > _SETTLED_NS:
        _store(note, digest)
    return digest


def _note_of(stamp: FileStamp) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mlxvr" / "sha256" / hashlib.sha256(repr(stamp).encode()).hexdigest()[:32]


def _store(target: Path, digest: str) -> None:
    with contextlib.suppress(ConfigError):
        replace_file(target, lambda file: file.write(digest.encode()))
