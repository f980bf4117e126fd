"""SHA-256 of weights files: right, computed once, and computed again after any change."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from mlxvr.errors import CheckpointError
from mlxvr.storage import content_hash
from mlxvr.storage.content_hash import hash_file, hash_files

BYTES = bytes(range(256)) * 50
YEAR_2020 = 1_577_836_800_000_000_000  # ns


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content_hash, "_WORTH_STORING", 1000)
    return tmp_path / "cache" / "mlxvr" / "sha256"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read to be hashed."""
    names: list[str] = []
    digest = hashlib.file_digest

    def count(file, algorithm):
        names.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", count)
    return names


def write(file: Path, content: bytes, changed: int = YEAR_2020) -> str:
    file.write_bytes(content)
    os.utime(file, ns=(changed, changed))
    return hashlib.sha256(content).hexdigest()


def test_the_hash_is_that_of_all_bytes(tmp_path: Path, cache: Path) -> None:
    files = {
        tmp_path / f"{index}.safetensors": write(tmp_path / f"{index}.safetensors", BYTES[index:]) for index in range(9)
    }
    assert hash_files(files) == files


def test_a_file_is_read_once(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    expected = write(tmp_path / "a", BYTES)
    assert [hash_file(tmp_path / "a") for _ in range(3)] == [expected] * 3
    assert reads == ["a"]
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert hash_file(tmp_path / "link") == expected
    assert reads == ["a"]


def test_any_change_is_seen(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    file = tmp_path / "a"
    write(file, BYTES)
    hash_file(file)
    changed = b"x" + BYTES[1:]
    assert hash_file(file) != write(file, changed, YEAR_2020 + 1)  # the same size, one nanosecond later
    assert hash_file(file) == hashlib.sha256(changed).hexdigest()
    write(tmp_path / "b", BYTES, YEAR_2020 + 1)
    os.replace(tmp_path / "b", file)  # the same name, size and time, another file
    assert hash_file(file) == hashlib.sha256(BYTES).hexdigest()
    assert reads == ["a", "a", "a"]


def test_what_was_just_written_or_is_small_is_read_every_time(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    write(tmp_path / "new", BYTES, time.time_ns())
    write(tmp_path / "small", BYTES[:900])
    for _ in range(2):
        hash_file(tmp_path / "new")
        hash_file(tmp_path / "small")
    assert reads == ["new", "small"] * 2
    assert not cache.exists()


def test_the_hubs_cache_names_its_blobs_by_their_hash(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    blob = tmp_path / "blobs" / hashlib.sha256(BYTES).hexdigest()
    blob.write_bytes(BYTES)
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    assert hash_file(tmp_path / "snapshot" / "model.safetensors") == blob.name
    assert reads == []
    other = tmp_path / "blobs" / "a1b2c3"  # small files are called by a git hash
    other.write_bytes(BYTES)
    assert hash_file(other) == blob.name
    assert reads == ["a1b2c3"]


@pytest.mark.parametrize("damage", [b"", b"no hash", b"\xff\xfe"])
def test_a_damaged_note_is_replaced(tmp_path: Path, cache: Path, reads: list[str], damage: bytes) -> None:
    expected = write(tmp_path / "a", BYTES)
    hash_file(tmp_path / "a")
    (note,) = cache.iterdir()
    note.write_bytes(damage)
    assert hash_file(tmp_path / "a") == expected
    assert note.read_text() == expected


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch, cache: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    assert hash_file(tmp_path / "cache") == hashlib.sha256(b"a file is in the way").hexdigest()
    expected = write(tmp_path / "a", BYTES)
    assert hash_file(tmp_path / "a") == expected


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, cache: Path, monkeypatch) -> None:
    write(tmp_path / "a", BYTES)
    digest = hashlib.file_digest

    def change(file, algorithm):
        write(tmp_path / "a", BYTES[::-1], YEAR_2020 + 5)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", change)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        hash_file(tmp_path / "a")
    with pytest.raises(CheckpointError, match="cannot be read"):
        hash_file(tmp_path / "missing")
