"""What we pass by keyword to other packages, against the releases that are installed.

A major release of a package may drop an argument (PyAV 19 dropped one of `av.open`); then this test names the file, the
line, the function and the argument, before a user meets a TypeError.
"""

import ast
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import av
import pytest
from keyword_calls import METHODS, KeywordCall, is_installed, parameters_of, read_calls

import mlxvr

PACKAGE = Path(mlxvr.__file__).parent
OPTIONAL = {"lmms_eval", "wandb"}  # no extra installs them


def installed(callee: str) -> str:
    """Name and release of the package that a dotted name belongs to."""
    top = callee.partition(".")[0]
    names = sorted(set(packages_distributions().get(top, [])))
    return ", ".join(f"{name} {version(name)}" for name in names) or top


def faults(call: KeywordCall) -> list[str]:
    """What the installed release lacks of a call, as text; nothing where it cannot be said."""
    try:
        missing = call.missing()
    except LookupError:
        return [f"{call.where}: {installed(call.callee)} has no {call.callee}"]
    return [f"{call.where}: {call.callee} of {installed(call.callee)} takes no {name}=" for name in missing or ()]


@pytest.fixture(scope="module")
def calls():
    """Calls of third-party packages that are installed."""
    every = [
        call
        for path in sorted(PACKAGE.rglob("*.py"))
        for call in read_calls(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE.parent).as_posix())
    ]
    every = [call for call in every if call.callee.partition(".")[0] not in sys.stdlib_module_names]
    absent = {call.callee.partition(".")[0] for call in every if not is_installed(call.callee)}
    assert absent <= OPTIONAL
    return [call for call in every if call.callee.partition(".")[0] not in absent]


def test_the_installed_releases_take_every_keyword_that_we_pass(calls):
    assert [fault for call in calls for fault in faults(call)] == []


def test_most_calls_can_be_checked(calls):
    """171 calls in 12 packages when this was written; releases of numpy before 2.4 tell less of themselves."""
    checked = [call for call in calls if call.missing() is not None]
    assert len(calls) > 150
    assert len(checked) > 80
    packages = {call.callee.partition(".")[0] for call in checked}
    assert packages >= {
        "av",
        "PIL",
        "huggingface_hub",
        "matplotlib",
        "mlx",
        "mlx_vlm",
        "numpy",
        "pyarrow",
        "tokenizers",
    }


def test_an_argument_that_pyav_dropped_is_named():
    """The call that broke on Python 3.12 and later: PyAV 18 takes the argument, PyAV 19 does not."""
    source = 'import av\n\ncontainer = av.open("clip.mp4", metadata_errors="replace", mode="r")\n'
    (call,) = read_calls(source, "demux.py")
    major = int(av.__version__.partition(".")[0])
    expected = f"demux.py:3: av.open of av {av.__version__} takes no metadata_errors="
    assert faults(call) == ([expected] if major >= 19 else [])


SOURCE = """
import av.container
import mlx.core as mx
import numpy as np
from huggingface_hub import HfApi
from PIL import Image


def imported(path):
    Image.open(path, mode="r")
    Image.open(path, wrong=1)


def compiled(a):
    mx.concatenate([a, a], axis=0)
    mx.concatenate([a, a], wrong=1)
    mx.fast.rms_norm(a, a, wrong=1)


def annotated(container: av.container.InputContainer, array: np.ndarray):
    container.seek(0, backward=True)
    container.seek(0, wrong=1)
    array.astype(int, wrong=1)


def assigned():
    api = HfApi()
    api.create_repo("a/b", exist_ok=True)
    api.create_repo("a/b", wrong=1)


def undeclared(frame):
    frame.reformat(format="rgb24")
    frame.reformat(wrong=1)


def hidden(np):
    np.zeros(3, wrong=1)


def gone():
    np.never_was(a=1)
"""


def test_calls_are_found_however_the_callee_is_named():
    lines = SOURCE.splitlines()
    expected = [f"x.py:{number}" for number, line in enumerate(lines, start=1) if "wrong=1" in line]
    expected = [where for where in expected if "np.zeros" not in lines[int(where[5:]) - 1]]  # that one is a parameter
    named = [fault for call in read_calls(SOURCE, "x.py") for fault in faults(call)]
    assert [fault.partition(": ")[0] for fault in named[:-1]] == expected
    assert all(fault.endswith(" takes no wrong=") for fault in named[:-1])
    assert named[-1].endswith("has no numpy.never_was")


@pytest.mark.parametrize("method", METHODS.values())
def test_methods_that_are_called_on_undeclared_objects_exist(method):
    if is_installed(method):
        assert parameters_of(method) is not None


def test_their_names_are_not_our_own():
    """A method of ours with such a name would be checked against a package's."""
    defined = {
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert defined.isdisjoint(METHODS)
