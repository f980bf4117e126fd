"""CONTRIBUTING's picture of the house: its floors are those of `test_layers`, its walks those of real runs."""

import re
import sys
from pathlib import Path

import pytest
from small_runs import flags as small_flags
from small_runs import make_settings
from test_layers import LAYERS

import mlxvr
from mlxvr.checkpoint.bundled import demo_folder

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(mlxvr.__file__).parent
DRAWINGS = re.findall(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
FLOORS, *WALKS = [[re.split(r"\s{2,}", line)[0] for line in drawing.splitlines()] for drawing in DRAWINGS]
TRACE = """
import os, sys, threading
from importlib import import_module
import mlxvr

package, entered = os.path.dirname(mlxvr.__file__) + os.sep, []

def enter(frame, event, _):
    code = frame.f_code
    is_function = code.co_flags & 1 and not code.co_name.startswith("<")  # no module, no body of a class
    name = code.co_filename.removeprefix(package)
    if event == "call" and is_function and name != code.co_filename and name not in entered:
        entered.append(name)

verb = import_module("mlxvr." + sys.argv[1])
threading.setprofile(enter)
sys.setprofile(enter)
exit_code = verb.main(sys.argv[2:])
sys.setprofile(None)
print("entered", *entered, sep="\\n")
sys.exit(exit_code)
"""


def test_the_floors_are_those_of_the_layer_test():
    drawn = [set(line.split()) for line in FLOORS]
    assert drawn == [names for names, _ in reversed(LAYERS) if "__init__" not in names]


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_names_files_that_exist_and_each_once(walk):
    assert [name for name in walk if not (PACKAGE / name).is_file()] == []
    assert len(walk) == len(set(walk)) > 5


def test_there_are_three_walks():
    assert [walk[0] for walk in WALKS] == ["generate.py", "train.py", "convert.py"]


@pytest.mark.parametrize("name", re.findall(r"`tests/(\w+\.py)`|`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text()))
def test_the_tests_that_are_named_exist(name):
    assert (ROOT / "tests" / f"{''.join(name).removesuffix('.py')}.py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("walk", WALKS)
def test_a_real_run_goes_the_same_way(walk, tmp_path, start_process, small_model):
    verb = walk[0].removesuffix(".py")
    flags = {
        "generate": [],
        "train": small_flags(make_settings(small_model, tmp_path / "run", steps=1)),
        "convert": ["--hf-path", demo_folder() / "checkpoint", "--mlx-path", tmp_path / "converted"],
    }
    process = start_process([sys.executable, "-c", TRACE, verb, *flags[verb]])
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    entered = printed.partition("entered\n")[2].split()
    assert [name for name in entered if name in walk] == walk, entered
