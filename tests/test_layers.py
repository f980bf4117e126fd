"""The house has layers: imports point downward only, and the lower ones need little.

Every import in the package is read from the source: at the top of a file, inside functions, under `TYPE_CHECKING`, and
by `import_module`. The rules are functions from that graph to the list of its violations, so they are also tried on
imports that break them.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mlxvr

PACKAGE = Path(mlxvr.__file__).parent

# The rooms from the bottom up. Two rooms on one floor use each other only where it says so.
LAYERS = [
    ({"errors"}, False),
    ({"storage"}, False),
    ({"runtime"}, False),
    ({"cli"}, False),
    ({"media"}, False),
    ({"data"}, False),
    ({"answering", "grading"}, True),
    ({"checkpoint", "model"}, True),
    ({"conversion", "reasoner"}, False),
    ({"evaluation", "grpo"}, False),
    ({"diagnosis"}, False),
    ({"convert", "doctor", "eval", "fuse", "generate", "train"}, False),
    ({"__init__", "__main__"}, False),
]
RANKS = {name: rank for rank, (names, _) in enumerate(LAYERS) for name in names}

# What the lower rooms import of other packages; the rooms that are not named may import what they like.
NEEDS: dict[str, set[str]] = {
    "errors": set(),
    "storage": set(),
    "runtime": {"mlx", "numpy"},
    "cli": {"rich"},
    "media": {"PIL", "av", "numpy", "pillow_heif"},
    "data": {"PIL", "numpy"},
    "answering": set(),
    "grading": set(),
}
OPTIONAL = {  # extras, imported when they are needed
    "mlxvr.data.tables": {"pyarrow"},
    "mlxvr.grading.math_equality": {"math_verify"},
    "mlxvr.cli.plotting": {"matplotlib"},
}
NEVER = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "torch", "torchvision"}
MLX_VLM = {"mlxvr.model.adapter", "mlxvr.model.cache"} | {
    f"mlxvr.model.families.{path.stem}" for path in (PACKAGE / "model" / "families").glob("*.py") if path.stem != "base"
}
TOKENS_ONLY = {"mlxvr.model.cache", "mlxvr.model.decode"}


def read_package():
    """Source of every module of the package, by its dotted name."""
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["mlxvr", *path.relative_to(PACKAGE).with_suffix("").parts]
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return sources


def names_imported(node, package):
    """The dotted names that a statement may import: the module, and each name as if it were a submodule."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        return [f"{module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
        return [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return []


def graph(sources):
    """For each module the modules that it imports: ours by their full name, others by their first."""
    packages = {name.rpartition(".")[0] for name in sources}
    result = {}
    for module, source in sources.items():
        package = module if module in packages else module.rpartition(".")[0]
        found = set()
        for node in ast.walk(ast.parse(source)):
            for name in names_imported(node, package):
                if name.partition(".")[0] == "mlxvr":
                    while name not in sources and "." in name:  # a name in a module, not a module
                        name = name.rpartition(".")[0]
                    found.add(name)
                elif not isinstance(node, ast.Call) or name.isidentifier():
                    found.add(name.partition(".")[0])
        result[module] = found
    return result


def part(module):
    """The name in LAYERS that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def upward(imports):
    """Imports that do not point downward."""
    wrong = []
    for module, names in imports.items():
        for name in sorted(names):
            if name.partition(".")[0] != "mlxvr" or part(name) == part(module):
                continue
            above, below = RANKS[part(module)], RANKS[part(name)]
            version = name == "mlxvr"  # the root itself holds the version; its other names come from modules
            if not version and (below > above or (below == above and not LAYERS[above][1])):
                wrong.append(f"{module} imports {name}")
    return wrong


def cycles(imports):
    """The first cycle among the modules, as text; empty if there is none."""
    ours = {module: {name for name in names if name in imports} for module, names in imports.items()}
    # importing a module runs its package first: that is no dependency on what else the package offers
    edges = {module: {name for name in names if not module.startswith(f"{name}.")} for module, names in ours.items()}
    try:
        TopologicalSorter({module: names - {module, "mlxvr"} for module, names in edges.items()}).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return ""


def misplaced(imports):
    """Imports of other packages where they do not belong."""
    wrong = []
    for module, names in imports.items():
        others = {name for name in names if name.partition(".")[0] != "mlxvr"} - set(sys.stdlib_module_names)
        bad = names & NEVER
        if part(module) in NEEDS:
            bad |= others - NEEDS[part(module)] - OPTIONAL.get(module, set())
        if module not in MLX_VLM:
            bad |= names & {"mlx_vlm"}
        if module in TOKENS_ONLY:
            bad |= names & {"tokenizers", "transformers", "mlxvr.model.tokenizer"}
        wrong += [f"{module} imports {name}" for name in sorted(bad)]
    return wrong


@pytest.fixture(scope="module")
def imports():
    return graph(read_package())


def test_every_module_has_a_layer(imports):
    assert {part(module) for module in imports} <= set(RANKS)


def test_imports_point_downward(imports):
    assert upward(imports) == []


def test_there_are_no_cycles(imports):
    assert cycles(imports) == ""


def test_other_packages_stay_where_they_belong(imports):
    assert misplaced(imports) == []


# What the rules must catch: a line that a module of the package is given, and the import that is then wrong.
@pytest.mark.parametrize(
    ("rule", "module", "line", "wrong"),
    [
        (upward, "mlxvr.errors", "import mlxvr.media", "mlxvr.media"),
        (upward, "mlxvr.media.image", "from mlxvr.model import network", "mlxvr.model.network"),
        (upward, "mlxvr.media.image", "from ..model import network", "mlxvr.model.network"),
        (upward, "mlxvr.media", "from ..model import network", "mlxvr.model.network"),
        (upward, "mlxvr.model.decode", "from mlxvr.conversion.upload import upload", "mlxvr.conversion.upload"),
        (upward, "mlxvr.model.decode", 'import_module("mlxvr.reasoner.reasoner")', "mlxvr.reasoner.reasoner"),
        (
            upward,
            "mlxvr.checkpoint.hub",
            "def f():\n    import mlxvr.evaluation.analysis.metrics",
            "mlxvr.evaluation.analysis.metrics",
        ),
        (
            upward,
            "mlxvr.reasoner.reasoner",
            "if TYPE_CHECKING:\n    import mlxvr.evaluation.analysis.metrics",
            "mlxvr.evaluation.analysis.metrics",
        ),
        (upward, "mlxvr.generate", "from mlxvr.convert import convert", "mlxvr.convert"),
        (upward, "mlxvr.reasoner.reasoner", "from mlxvr import __version__", None),
        (misplaced, "mlxvr.errors", "import numpy", "numpy"),
        (misplaced, "mlxvr.answering.transcript", "import mlx.core as mx", "mlx"),
        (misplaced, "mlxvr.media.video.video_reader", "def f():\n    import mlx.core", "mlx"),
        (misplaced, "mlxvr.reasoner.reasoner", "import torch", "torch"),
        (misplaced, "mlxvr.checkpoint.folder", "def f():\n    import pickle", "pickle"),
        (misplaced, "mlxvr.checkpoint.folder", 'importlib.import_module("torch")', "torch"),
        (misplaced, "mlxvr.reasoner.reasoner", "from mlx_vlm import load", "mlx_vlm"),
        (misplaced, "mlxvr.model.decode", "from mlxvr.model.tokenizer import x", "mlxvr.model.tokenizer"),
    ],
)
def test_the_rules_catch(imports, rule, module, line, wrong):
    sources = read_package()
    found = rule(graph({**sources, module: f"{sources[module]}\n{line}\n"}))
    assert [said for said in found if said not in rule(imports)] == ([f"{module} imports {wrong}"] if wrong else [])


def test_the_rules_catch_a_cycle():
    sources = read_package()
    sources["mlxvr.model.families.base"] += "\ndef f():\n    from mlxvr.checkpoint.folder import ModelFolder\n"
    assert "mlxvr.model.families.base" in cycles(graph(sources))


def test_a_new_module_needs_a_layer():
    assert part("mlxvr.utils") not in RANKS


@pytest.mark.parametrize(
    "module", ["mlxvr", "mlxvr.errors", "mlxvr.media", "mlxvr.answering.transcript", "mlxvr.answering.confidence"]
)
def test_what_is_light_loads_nothing_heavy(module):
    """In a fresh process, since this one may have loaded anything."""
    code = (
        f"import sys, {module}\n"
        "heavy = {'mlx', 'mlx_lm', 'mlx_vlm', 'transformers', 'tokenizers', 'torch', 'huggingface_hub'}\n"
        "sys.stdout.write(' '.join(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == ""


def test_protocol_and_confidence_need_nothing_but_the_standard_library():
    """Without site-packages they can still be imported."""
    command = [
        sys.executable,
        "-S",
        "-c",
        "import mlxvr.answering.confidence, mlxvr.answering.transcript, mlxvr.errors",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
