"""The files of a benchmark's release: tables, and videos in one of several folders.

The folder may be the Hub's cache, where every file is a symlink to another folder: symlinks are followed, since the
user chose the folder. Names from a table may not lead out of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mlxvr.data.tables import load_file, read_records
from mlxvr.errors import DataError
from mlxvr.storage.paths import list_visible

__all__ = ["Folder"]

_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov")


class Folder:
    """The root of a release."""

    def __init__(self, root: Path, name: str):
        """Take a folder that exists; `name` is the benchmark's, for messages."""
        if not root.is_dir():
            raise DataError(f"{root} is not a folder: give the folder with {name}'s files (--data-root, data_root=)")
        self.root, self.name = root, name
        self._videos: dict[tuple[str, ...], Path | None] = {}  # by name and folders

    def files(self, *patterns: str) -> list[Path]:
        """Return the files of the first pattern that matches any, sorted; raises `DataError` if none does."""
        for pattern in patterns:
            if paths := [path for path in list_visible(self.root, pattern) if path.is_file()]:
                return paths
        raise DataError(
            f"{self.root} holds none of {', '.join(patterns)}: give {self.name}'s folder (--data-root, data_root=)"
        )

    def table(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the records of a table, each with its "file:line" (in parquet and JSON: the record's number, from 1).

        Raises `DataError`: the file is damaged, or it is parquet and pyarrow is not installed.
        """
        relative = path.relative_to(self.root)
        for number, record in enumerate(read_records(path), start=1):
            if not isinstance(record, Mapping):
                raise DataError(
                    f"{path}: entry {number} is of type {type(record).__name__}: expected a record, download it again"
                )
            yield f"{relative}:{number}", dict(record)

    def mapping(self, path: Path) -> dict[str, str]:
        """Read a JSON file that maps names to texts; raises `DataError` if it is anything else."""
        content = load_file(path)
        if not isinstance(content, Mapping) or not all(isinstance(value, str) for value in content.values()):
            raise DataError(f"{path} is not a mapping of names to texts: download it again")
        return dict(content)

    def find(self, name: str, folders: Sequence[str], *, frames: bool = False) -> Path | None:
        """Return the video of a name, with or without a suffix, in the first of the folders that has it; else None.

        With `frames`, a folder of that name counts as a video too.
        """
        pure = PurePosixPath(name)
        if not name or pure.is_absolute() or ".." in pure.parts:
            return None
        key = (str(frames), name, *folders)
        if key not in self._videos:
            paths = (path for folder in folders for path in self._spellings(folder, pure))
            self._videos[key] = next((path for path in paths if path.is_file() or (frames and path.is_dir())), None)
        return self._videos[key]

    def _spellings(self, folder: str, name: PurePosixPath) -> Iterator[Path]:
        base = self.root / folder
        yield base / name
        stem = name.with_suffix("") if name.suffix in _SUFFIXES else name
        for suffix in _SUFFIXES:
            yield base / f"{stem}{suffix}"
