"""The public API has types: a user's script passes mypy and pyright and runs, and its typos do not pass.

The keywords of `load`, `open` and `ask` are written twice: with defaults and checks in a dataclass, and for type
checkers in a `TypedDict`. Here the two are compared.
"""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import mlxvr
from mlxvr.answering.loop import AskKeywords, AskRequest
from mlxvr.conversion.conversion_options import ConvertKeywords, ConvertOptions, FuseKeywords, FuseOptions
from mlxvr.media.frame_options import FrameKeywords, FrameOptions
from mlxvr.reasoner.load_options import LoadKeywords, LoadOptions

SCRIPT = Path(__file__).parent / "user_script.py"
ROOT = Path(mlxvr.__file__).parents[1]
TYPOS = [
    ("mlxvr.load(kv_bit=4)", "kv_bit"),
    ('mlxvr.load(kv_bits="4")', "kv_bits"),
    ('reasoner.open("a.mp4", fsp=3.0)', "fsp"),
    ('reasoner.ask("a.mp4", "What?", fsp=3.0)', "fsp"),
    ('reasoner.ask("a.mp4", "What?", mode="sometimes")', "mode"),
    ('clip.ask("What?", optons=["a"])', "optons"),
    ('clip.stream("What?", threshold="high")', "threshold"),
    ('convert("a", "b", bit=4)', "bit"),
    ('convert("a", "b", group_size="64")', "group_size"),
    ('fuse("a", "b", "c", forced=True)', "forced"),
]


def check(command, cwd):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, cwd=cwd)


def checkers():
    """The type checkers that are installed beside this Python, as commands."""
    folder = Path(sys.executable).parent
    for name, options in (("mypy", ["--strict", "--ignore-missing-imports"]), ("pyright", [])):
        program = shutil.which(name, path=str(folder)) or shutil.which(name)
        reason = f"{name} is not installed" if program is None else ""
        if name == "pyright" and program is not None and check([program, "--version"], folder).returncode:
            reason = "pyright cannot run here: it needs node"
        yield pytest.param([program, *options], id=name, marks=pytest.mark.skipif(bool(reason), reason=reason))


@pytest.mark.slow
@pytest.mark.parametrize("checker", checkers())
def test_a_users_script_has_types(checker, tmp_path):
    script = shutil.copy(SCRIPT, tmp_path / "script.py")
    (tmp_path / "mlxvr").symlink_to(ROOT / "mlxvr")
    done = check([*checker, script], tmp_path)
    errors = [line for line in done.stdout.splitlines() if "error" in line and "script.py" in line]
    assert errors == []


@pytest.mark.slow
@pytest.mark.parametrize("checker", checkers())
def test_typos_do_not_pass(checker, tmp_path):
    imports = ["import mlxvr", "from mlxvr.convert import convert", "from mlxvr.fuse import fuse"]
    lines = [*imports, "def f(reasoner: mlxvr.Reasoner, clip: mlxvr.Clip) -> None:"]
    script = tmp_path / "script.py"
    script.write_text("\n".join([*lines, *(f"    {line}" for line, _ in TYPOS), ""]))
    (tmp_path / "mlxvr").symlink_to(ROOT / "mlxvr")
    done = check([*checker, script], tmp_path)
    for number, (line, _) in enumerate(TYPOS, len(lines) + 1):
        assert f"script.py:{number}:" in done.stdout, line


@pytest.mark.slow
def test_a_users_script_runs(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "converted" / "config.json").is_file()
    assert (tmp_path / "report" / "report.json").is_file()
    assert (tmp_path / "run" / "adapters.safetensors").is_file()


@pytest.mark.parametrize(
    ("keywords", "config", "positional"),
    [
        (LoadKeywords, LoadOptions, {"model"}),
        (FrameKeywords, FrameOptions, set()),
        (AskKeywords, AskRequest, {"text"}),
        (ConvertKeywords, ConvertOptions, {"source", "out"}),
        (FuseKeywords, FuseOptions, {"model", "adapter", "out"}),
    ],
)
def test_keywords_are_the_fields(keywords, config, positional):
    """The same names, and of each the same type."""
    fields = {field.name for field in dataclasses.fields(config)} - positional
    types = get_type_hints(config)
    assert get_type_hints(keywords) == {name: types[name] for name in fields}
    assert not keywords.__required_keys__


def test_the_keywords_of_ask_are_those_of_open_and_of_a_clip():
    assert get_type_hints(mlxvr.OpenAndAskKeywords) == {**get_type_hints(FrameKeywords), **get_type_hints(AskKeywords)}
