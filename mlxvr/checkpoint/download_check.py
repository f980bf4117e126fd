"""The check of downloads: files from the Hub are compared with the hashes that the Hub announced.

The Hub's client compares sizes; over plain HTTP it does not compare content. However, it names each file of its cache
after the file's ETag, which is the SHA-256 of a large file (LFS) or git's SHA-1 of a small one. So each new file is
read once more and compared with its own name; a file that differs is removed, and the next call fetches it again.

Only new files are read. Before a download begins, a note beside the blobs lists the files that exist; it is removed
when all later files have been checked. If the process dies in between, the note stays, and the next call checks the
rest. The client ignores the note, and deletes it together with the repository. There are two limits: files that another
program fetched are not checked, and a disk without symbolic links (exFAT) has no such names, so only sizes are compared
there.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.runtime.hooks import Progress
from mlxvr.storage.atomic import replace_file
from mlxvr.storage.paths import list_all

__all__ = ["check", "noted"]

_NOTE = "mlxvr-unchecked.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
_BLOCK = 8 << 20
_log = logging.getLogger(__name__)


@contextmanager
def noted(repository: Path) -> Iterator[frozenset[str]]:
    """Note which blobs a repository's folder in the Hub's cache holds, until a download into it has been checked.

    Yields the names of the blobs that `check` need not read. The note stays when the block fails, unless no file
    arrived.
    """
    note = repository / _NOTE
    present = frozenset(_blobs(repository))
    known = present & _read(note, present)
    with suppress(ConfigError):  # a read-only cache gets no new files either
        replace_file(note, lambda file: file.write(json.dumps(sorted(known)).encode()))
    try:
        yield known
    except BaseException:
        if known.issuperset(_blobs(repository)):
            _remove(note)
        raise
    _remove(note)


def check(snapshot: Path, known: frozenset[str], progress: Progress | None = None) -> None:
    """Hash every file of a snapshot whose blob is not in `known`, with `progress("check", bytes_done, bytes_total)`.

    Raises `CheckpointError` that names the files whose hashes differ from the Hub's; they have been removed.
    """
    arrived: dict[str, list[Path]] = {}
    for link in list_all(snapshot):
        name = Path(os.readlink(link)).name if link.is_symlink() else ""
        if name not in known and (_SHA256.fullmatch(name) or _GIT_SHA1.fullmatch(name)):
            arrived.setdefault(name, []).append(link)
    total, done = sum(links[0].stat().st_size for links in arrived.values()), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("check", done, total)

    damaged: list[str] = []
    for name, links in arrived.items():
        if _digest(links[0], name, advance) != name:
            damaged += [link.name for link in links]
            _discard(links)
    if damaged:
        raise CheckpointError(
            f"{', '.join(damaged)} arrived damaged (the hash differs from the one that the Hub announced) and has been "
            "removed; run again to fetch it again, and if that does not help, check the proxy or mirror in between"
        )
    _log.info("checked %d new files, %d bytes", len(arrived), total)


def _digest(path: Path, announced: str, advance: Callable[[int], None]) -> str:
    """Return the hash of a file, SHA-256 or git's SHA-1 as `announced`."""
    if _SHA256.fullmatch(announced):
        hasher = hashlib.sha256()
    else:  # git's blob hash
        hasher = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            hasher.update(block[:count])
            advance(count)
    return hasher.hexdigest()


def _discard(links: list[Path]) -> None:
    """Remove a file from the cache: the stored file (perhaps shared between repositories), its blob, and its links."""
    blob = links[0].parent / os.readlink(links[0])
    for path in (Path(os.path.realpath(blob)), blob, *links):
        path.unlink(missing_ok=True)


def _blobs(repository: Path) -> Iterator[str]:
    folder = repository / "blobs"
    if folder.is_dir():
        yield from (path.name for path in list_all(folder) if path.suffix != ".incomplete" and path.exists())


def _read(note: Path, default: frozenset[str]) -> frozenset[str]:
    """Return the blobs that an earlier download noted; none if the note cannot be read."""
    try:
        return frozenset(json.loads(note.read_bytes()))
    except FileNotFoundError:
        return default
    except (OSError, ValueError, TypeError):
        return frozenset()


def _remove(note: Path) -> None:
    with suppress(OSError):
        note.unlink()
        note.parent.rmdir()  # only where nothing else is in it: a repository that does not exist
