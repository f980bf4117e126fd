"""The house stays small: few files on the top floor, no crowded room, one name for one thing, names that say something.

Each rule is a function from the package's sources to the list of its violations, so it is also tried on sources that
break it.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import mlxvr

PACKAGE = Path(mlxvr.__file__).parent

MOST_ON_THE_TOP_FLOOR = 14
MOST_IN_A_ROOM = 16
EMPTY_NAMES = {"one", "found", "told", "said", "other", "given", "kept"}


def read_package():
    """Source of every file of the package that has modules beside it, by its path in the package; others are ""."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
        for path in sorted(files)
    }


def crowded(sources):
    """Folders with more files than a newcomer can overlook; `__init__.py` is not counted below the top floor."""
    rooms = defaultdict(set)
    for path in sources:
        folder, _, name = path.rpartition("/")
        if not folder or name != "__init__.py":
            rooms[folder].add(name)
    limits = {folder: MOST_IN_A_ROOM if folder else MOST_ON_THE_TOP_FLOOR for folder in rooms}
    return [f"{folder or 'mlxvr'}: {len(names)}" for folder, names in rooms.items() if len(names) > limits[folder]]


def shared_stems(sources):
    """Names that two modules share."""
    paths = defaultdict(list)
    for path in sources:
        if path.endswith(".py") and Path(path).stem != "__init__":
            paths[Path(path).stem].append(path)
    return [" = ".join(same) for same in paths.values() if len(same) > 1]


def shared_classes(sources):
    """Names that two classes share."""
    paths = defaultdict(list)
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                paths[node.name].append(path)
    return [f"{name}: {', '.join(places)}" for name, places in paths.items() if len(places) > 1]


def names_in(node):
    """The names that a node of the syntax tree binds, passes or reads from an object."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.Attribute(attr=name):
            return [name]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.keyword(arg=str(name)) | ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
            return [name]
        case ast.alias(asname=str(name)):
            return [name]
    return []


def empty_names(sources):
    """Variables, parameters, attributes and functions whose name does not say what they hold."""
    return [
        f"{path}:{node.lineno} {name}"
        for path, source in sources.items()
        for node in ast.walk(ast.parse(source))
        for name in names_in(node)
        if name in EMPTY_NAMES
    ]


@pytest.fixture(scope="module")
def sources():
    return read_package()


def test_no_floor_is_crowded(sources):
    assert crowded(sources) == []


def test_modules_have_names_of_their_own(sources):
    assert shared_stems(sources) == []


def test_classes_have_names_of_their_own(sources):
    assert shared_classes(sources) == []


def test_names_say_what_they_hold(sources):
    assert empty_names(sources) == []


@pytest.mark.parametrize(
    ("rule", "more", "violations"),
    [
        (crowded, {f"media/x{n}.py": "" for n in range(16)}, ["media: "]),
        (crowded, {f"x{n}.py": "" for n in range(14)}, ["mlxvr: "]),
        (shared_stems, {"media/hub.py": ""}, ["checkpoint/hub.py = media/hub.py"]),
        (
            shared_classes,
            {"media/x.py": "class ModelFolder:\n    pass\n"},
            ["ModelFolder: checkpoint/folder.py, media/"],
        ),
        (
            shared_classes,
            {"media/x.py": "def f():\n    class Recipe:\n        pass\n"},
            ["Recipe: checkpoint/recipe.py"],
        ),
        (empty_names, {"errors.py": "one = 1\n"}, ["errors.py:1 one"]),
        (empty_names, {"errors.py": "def f(given): ...\n"}, ["errors.py:1 given"]),
        (empty_names, {"errors.py": "class A:\n    kept: int = 0\n"}, ["errors.py:2 kept"]),
        (empty_names, {"errors.py": "for i, told in x: ...\n"}, ["errors.py:1 told"]),
        (empty_names, {"errors.py": "a = [other for other in x]\n"}, ["errors.py:1 other"]),
        (empty_names, {"errors.py": "a.said = f(found=2)\n"}, ["errors.py:1 said", "errors.py:1 found"]),
        (empty_names, {"errors.py": "a = {'one': 'other'}  # found\n"}, []),
    ],
)
def test_the_rules_catch(sources, rule, more, violations):
    before = set(rule(sources))
    after = [line for line in rule({**sources, **more}) if line not in before]
    assert len(after) == len(violations)
    assert all(line.startswith(start) for line, start in zip(sorted(after), sorted(violations), strict=True))
