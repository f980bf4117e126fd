"""The public surface: the names that an app imports, the tree of errors, documentation, and what files may not say."""

import ast
import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest

import mlxvr
from mlxvr import errors

PACKAGE = Path(mlxvr.__file__).parent
ROOT = PACKAGE.parent
SOURCES = {path.relative_to(ROOT).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

PUBLIC = [
    "Answer",
    "AskKeywords",
    "AskRequest",
    "Cancelled",
    "CheckpointError",
    "Clip",
    "ConfigError",
    "DataError",
    "Event",
    "FirstAnswer",
    "FrameKeywords",
    "Kind",
    "LoadKeywords",
    "MediaError",
    "MlxvrError",
    "Mode",
    "OpenAndAskKeywords",
    "Option",
    "OutOfMemoryError",
    "Reasoner",
    "ReasoningDelta",
    "RecipeError",
    "Usage",
    "VerificationError",
    "load",
]


def test_the_names_are_these():
    assert mlxvr.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(mlxvr))


def test_every_name_is_there():
    aliases = {"Event", "Kind", "Mode"}  # of types, which have no module
    for name in PUBLIC:
        assert name in aliases or getattr(mlxvr, name).__module__.startswith("mlxvr.")
    assert get_args(mlxvr.Event) == (mlxvr.FirstAnswer, mlxvr.ReasoningDelta, mlxvr.Answer)
    assert "grounding" in get_args(mlxvr.Kind)
    assert "think" in get_args(mlxvr.Mode)


def test_no_name_hides_a_module():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert modules & set(PUBLIC) == set()


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'Answers'"):
        mlxvr.Answers  # noqa: B018
    assert not hasattr(mlxvr, "np")


def test_the_errors_are_one_tree():
    assert sorted(errors.__all__) == errors.__all__
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, errors.MlxvrError)
        assert getattr(mlxvr, name) is error
        bases = (Exception,) if error is errors.MlxvrError else (errors.MlxvrError,)
        assert error.__bases__ == bases, "the tree is flat"
        assert name in errors.__doc__


def test_every_error_is_drawn_in_the_tree():
    raised = {
        node.name for node in ast.parse(SOURCES["mlxvr/errors.py"].read_text()).body if isinstance(node, ast.ClassDef)
    }
    assert raised == set(errors.__all__)


@pytest.mark.parametrize(
    "name", ["mlxvr", "mlxvr.errors", "mlxvr.media", "mlxvr.answering.transcript", "mlxvr.answering.confidence"]
)
def test_what_is_offered_exists(name):
    module = importlib.import_module(name)
    for offered in module.__all__:
        assert getattr(module, offered) is not None


def offered(tree):
    """The names in a module's `__all__`, None if it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    return None


def in_order(name):
    """Constants, then classes, then the rest, each by the alphabet with numbers by their value (ruff's order)."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", name)]


def defined(tree):
    """The names that a module binds at its top."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def undocumented(tree):
    """Public functions, classes and methods without a docstring."""
    missing = [] if ast.get_docstring(tree) else ["the module"]
    todo = [(node, "") for node in tree.body]
    for node, inside in todo:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        overloaded = any(ast.unparse(decorator).endswith((".setter", "overload")) for decorator in node.decorator_list)
        if not overloaded and not ast.get_docstring(node):
            missing.append(inside + node.name)
        if isinstance(node, ast.ClassDef):
            todo += [(child, f"{node.name}.") for child in node.body]
    return missing


@pytest.mark.parametrize("path", SOURCES)
def test_a_module_says_what_it_offers(path):
    tree = ast.parse(SOURCES[path].read_text(encoding="utf-8"))
    names = offered(tree)
    code = [node for node in tree.body if not isinstance(node, ast.Expr)]
    if names is None:
        assert not code or path.endswith("__main__.py"), "a module with code has an `__all__`"
        return
    assert names == sorted(names, key=in_order)
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith("_")]
    assert set(names) <= defined(tree)


@pytest.mark.parametrize("path", SOURCES)
def test_what_is_public_has_a_docstring(path):
    assert undocumented(ast.parse(SOURCES[path].read_text(encoding="utf-8"))) == []


def test_missing_docstrings_are_found():
    source = "class A:\n    '''a'''\n    def b(self): ...\n    def _c(self): ...\ndef d(): ...\n"
    assert undocumented(ast.parse(source)) == ["the module", "d", "A.b"]


FOLDERS = "|".join(["tmp", "root", "work", "home", "Users", "mnt", "srv", "private"])
ABSOLUTE = re.compile(rf"(?<![\w./:>~$}}-])/(?:{FOLDERS})(?:/[\w.~-]|(?=[\s'\"`),;]|$))")


def tracked():
    """Every file that git tracks."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run([git, "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True, timeout=300)
    return [ROOT / name for name in done.stdout.decode().split("\0") if name]


def test_no_file_names_a_folder_of_the_machine_it_was_written_on():
    found = []
    for path in tracked():
        if not path.is_file():
            continue
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
            if ABSOLUTE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("see " + "/tm" + "p/clip.mp4", True),
        ("'" + "/roo" + "t'", True),
        ("cd " + "/wor" + "k/main", True),
        ("--out=" + "/hom" + "e/me/x", True),
        ("https://example.org" + "/wor" + "k/x", False),
        ("a relative/tmp/folder, and/work", False),
        ("${DIR}" + "/tm" + "p/x", False),
        ("clips in / tmp", False),
    ],
)
def test_such_folders_are_found(line, found):
    assert bool(ABSOLUTE.search(line)) is found
