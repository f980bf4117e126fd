"""The only room that replaces files and appends to them: what a failure leaves, and that no other room does it."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlxvr
from mlxvr.errors import ConfigError, DataError
from mlxvr.storage.atomic import replace_file, replacing
from mlxvr.storage.jsonl_log import JsonlLog, check_run, read_records, read_run, write_records

PACKAGE = Path(mlxvr.__file__).parent

# What replaces, appends to or locks a file.
WRITERS = {"os.replace", "os.rename", "os.renames", "os.fsync", "os.ftruncate", "os.pwrite", "os.open", "os.write"}
WRITERS |= {"shutil.move", "shutil.copy", "shutil.copyfile", "shutil.copy2", "fcntl.flock", "fcntl.lockf"}
METHODS = {"rename", "write_text", "write_bytes"}
SAVERS = {"mx.save_safetensors", "save_file"}  # of libraries, which open the file themselves
EXCEPTIONS = {
    "cli/parser.py: os.open": "the null device",
    "diagnosis/child.py: os.fdopen(.., 'w')": "a pipe",
    "grpo/shared_state.py: write_bytes": "a temporary folder of this process",
}


def writes(source):
    """The calls in a module that write a file in another way than through storage."""
    tree = ast.parse(source)
    inside = {
        id(call)
        for block in ast.walk(tree)
        if isinstance(block, ast.With) and any("replacing(" in ast.unparse(item.context_expr) for item in block.items)
        for part in [*block.items, *block.body]
        for call in ast.walk(part)
    }
    found = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name, last = ast.unparse(call.func), ast.unparse(call.func).rpartition(".")[2]
        modes = [value for value in call.args[:2] if isinstance(value, ast.Constant)]
        modes += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
        mode = next((m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str)), "r")
        if name in WRITERS or (last in METHODS and isinstance(call.func, ast.Attribute)):
            found.append(last if last in METHODS else name)
        elif last == "replace" and len(call.args) == 1 and not call.keywords and isinstance(call.func, ast.Attribute):
            found.append("replace")  # of a Path: that of a str takes two arguments, those of dataclasses names
        elif last in {"open", "fdopen"} and len(mode) <= 3 and set(mode) & set("wax+") and id(call) not in inside:
            found.append(f"{name}(.., {mode!r})")
        elif name in SAVERS and id(call) not in inside:
            found.append(name)
    return found


def test_no_other_room_replaces_or_appends_files():
    found = {
        f"{path.relative_to(PACKAGE).as_posix()}: {call}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "storage"
        for call in writes(path.read_text(encoding="utf-8"))
    }
    assert found == set(EXCEPTIONS)


@pytest.mark.parametrize(
    ("source", "calls"),
    [
        ("os.replace(a, b)", ["os.replace"]),
        ("path.rename(b)", ["rename"]),
        ("draft.replace(note)", ["replace"]),
        ("text.replace('a', 'b'); dataclasses.replace(x, a=1)", []),
        ("open(path)", []),
        ("open(path, 'rb')", []),
        ("path.open('ab')", ["path.open(.., 'ab')"]),
        ("open(path, mode='w')", ["open(.., 'w')"]),
        ("path.write_text('x')", ["write_text"]),
        ("with replacing(path) as other, other.open('wb') as file:\n    mx.save_safetensors(other, {})", []),
        ("mx.save_safetensors(str(path), {})", ["mx.save_safetensors"]),
    ],
)
def test_what_counts_as_writing(source, calls):
    assert writes(source) == calls


def test_storage_itself_is_seen():
    assert {"os.replace", "os.fsync"} <= set(writes((PACKAGE / "storage/atomic.py").read_text()))


@pytest.mark.parametrize("suffix", [None, ".safetensors"])
def test_replacing(tmp_path, suffix):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path, suffix=suffix) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == (suffix or ".json")
        assert temporary.name.startswith(".")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_replacing_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(f"{1 / 0}")
    with pytest.raises(FileExistsError), replacing(path) as temporary:
        temporary.write_text("new") and temporary.touch(exist_ok=False)
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"the disk of .*a\.json is full; free some space"):
        replace_file(path, lambda file: file.write(b"new"))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append(os.fstat(file).st_size), sync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    replace_file(tmp_path / "new" / "a", lambda file: file.write(b"12345"))
    assert events[:2] == [5, "replace"]
    assert len(events) == 3  # and the folder


KILLED = """
import os, sys
from pathlib import Path
from mlxvr.storage.atomic import replace_file
for number in range(10**6):
    replace_file(Path(sys.argv[1]), lambda file: file.write(b"%07d" % number * 10_000))
    print(number, flush=True)
"""


def test_killed_while_it_replaces(tmp_path):
    path = tmp_path / "a"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(5):
            process.stdout.readline()
    finally:
        process.kill()
        rest = process.stdout.read().splitlines()
        process.stdout.close()
        process.wait()
    content = path.read_bytes()
    assert len(content) == 70_000
    assert content == content[:7] * 10_000
    assert int(content[:7]) >= max([4, *map(int, rest[:-1])])


def test_a_log_without_settings(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    with JsonlLog(path) as log:
        log.append({"a": 1})
        log.append({"run": {"b": 2}})
        assert log.records() == [{"a": 1}, {"run": {"b": 2}}]
    assert path.read_text() == '{"a": 1}\n{"run": {"b": 2}}\n'
    assert read_run(path) == {}
    with pytest.raises(ConfigError, match="does not begin with the settings of a run; choose another output folder"):
        check_run(path, {"c": 1})


def test_retain(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a":1}\n\n{"a":  2}\n{"a": 3}\n{"a": 4')
    with JsonlLog(path) as log:
        before = os.stat(path).st_ino
        log.retain(lambda record: record["a"] != 2)
        assert path.read_bytes() == b'{"a":1}\n{"a": 3}\n'  # lines stay as they were written
        assert os.stat(path).st_ino != before
        with pytest.raises(ConfigError, match="another process is writing"):
            JsonlLog(path)
        log.append({"a": 5})
        assert [number for number, _ in read_records(path)] == [1, 2, 3]
        log.retain(lambda record: True)
        assert [record["a"] for record in log.records()] == [1, 3, 5]
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_a_log_names_what_to_do_about_a_damaged_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n[]\n')
    with (
        JsonlLog(path, remedy="throw it away") as log,
        pytest.raises(DataError, match=r"log\.jsonl:2: .*throw it away"),
    ):
        log.records()


def test_settings_are_compared_as_json(tmp_path):
    """A tuple is written as a list, and is the same setting."""
    path = tmp_path / "log.jsonl"
    write_records(path, [{"a": 1}], run={"limits": (1, 2)})
    assert path.read_text() == '{"run": {"limits": [1, 2]}}\n{"a": 1}\n'
    JsonlLog(path, {"limits": (1, 2)}).close()
    with pytest.raises(ConfigError, match=r"limits \[1, 2\] \(now \[1, 3\]\)"):
        JsonlLog(path, {"limits": (1, 3)})
