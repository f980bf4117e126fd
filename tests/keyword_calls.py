"""Read from source what we pass by keyword to other packages, and whether the installed release takes it.

    for call in read_calls(source, "mlxvr/media/video/decoding.py"):
        call.missing()    # ["metadata_errors"] under a release of PyAV without that argument; None: nothing says

A callee is resolved without running the source: by the names that the file imports, by annotations of parameters and
variables, by what a constructor is assigned to, and by `METHODS` for objects that the source declares as `Any`. Its
parameters come from `inspect.signature`, or from the `.pyi` file beside a compiled module, whose functions have none.
"""

import ast
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

OURS = "mlxvr"

# Methods called on objects whose class the source does not name. No class of ours has a method of the same name.
METHODS = {
    "auth_check": "huggingface_hub.HfApi.auth_check",
    "create_branch": "huggingface_hub.HfApi.create_branch",
    "create_repo": "huggingface_hub.HfApi.create_repo",
    "demux": "av.container.InputContainer.demux",
    "get_vocab_size": "tokenizers.Tokenizer.get_vocab_size",
    "load_weights": "mlx.nn.Module.load_weights",
    "model_info": "huggingface_hub.HfApi.model_info",
    "multinomial": "numpy.random.Generator.multinomial",
    "parse_statements": "jinja2.parser.Parser.parse_statements",
    "paste": "PIL.Image.Image.paste",
    "reformat": "av.video.reformatter.VideoReformatter.reformat",
    "repo_info": "huggingface_hub.HfApi.repo_info",
    "seek": "av.container.InputContainer.seek",
    "subplots": "matplotlib.figure.Figure.subplots",
    "tick_params": "matplotlib.axes.Axes.tick_params",
    "unfreeze": "mlx.nn.Module.unfreeze",
    "upload_folder": "huggingface_hub.HfApi.upload_folder",
}


@dataclass(frozen=True)
class Parameters:
    """What may be passed by keyword: names, and whether any other name is taken as well."""

    names: frozenset[str]
    takes_any: bool


@dataclass(frozen=True)
class KeywordCall:
    """A call of another package: `where` is file:line, `callee` a dotted name, `keywords` as passed."""

    where: str
    callee: str
    keywords: tuple[str, ...]

    def missing(self) -> list[str] | None:
        """Keywords that the installed release does not take; None where nothing says what it takes."""
        parameters = parameters_of(self.callee)
        if parameters is None or (parameters.takes_any and not set(self.keywords) <= parameters.names):
            return None
        return [keyword for keyword in self.keywords if keyword not in parameters.names]


def read_calls(source: str, file: str) -> Iterator[KeywordCall]:
    """Calls with keywords whose callee belongs to another package, in the order of the tree."""
    tree = ast.parse(source)
    imports = _imports(tree)
    yield from _calls(tree, imports, imports, file)


def is_installed(callee: str) -> bool:
    """Whether the package that a dotted name begins with can be imported: optional ones may be missing."""
    try:
        import_module(callee.partition(".")[0])
    except ImportError:
        return False
    return True


def _calls(node: ast.AST, imports: Mapping[str, str], known: Mapping[str, str], file: str) -> Iterator[KeywordCall]:
    """`known` maps the names of this scope to dotted names: imports as they are, variables as `Class()`."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        known = {**known, **_variables(node, imports)}
    if isinstance(node, ast.Call):
        keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
        callee = _callee(node.func, known)
        if keywords and callee and callee.partition(".")[0] != OURS:
            yield KeywordCall(f"{file}:{node.lineno}", callee, keywords)
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, imports, known, file)


def _imports(tree: ast.Module) -> dict[str, str]:
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _variables(function: ast.FunctionDef | ast.AsyncFunctionDef, imports: Mapping[str, str]) -> dict[str, str]:
    """Parameters and variables of a function whose class is written down; the others hide imports of their name."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    classes = {argument.arg: _dotted(argument.annotation, imports) for argument in every}
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            classes[node.target.id] = _dotted(node.annotation, imports)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            made = _dotted(node.value.func, imports) if isinstance(node.value, ast.Call) else ""
            classes.setdefault(node.targets[0].id, made if made and inspect.isclass(_resolve(made)) else "")
    return {name: f"{dotted}()" if dotted else "" for name, dotted in classes.items()}


def _dotted(node: ast.AST | None, names: Mapping[str, str]) -> str:
    """The dotted name of `a.b.c` where `a` is known; empty otherwise."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    first = names.get(node.id, "") if isinstance(node, ast.Name) else ""
    return ".".join([first, *reversed(parts)]) if first else ""


def _callee(node: ast.AST, known: Mapping[str, str]) -> str:
    dotted = _dotted(node, known)
    if dotted.endswith("()"):  # an object of a known class is called itself
        return ""
    if dotted:
        return dotted.replace("()", "")
    return METHODS.get(node.attr, "") if isinstance(node, ast.Attribute) else ""


@functools.cache
def _resolve(dotted: str) -> Any:
    """The object of a dotted name; None if there is none."""
    parts = dotted.split(".")
    try:
        found: Any = import_module(parts[0])
    except ImportError:
        return None
    for index, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            try:
                import_module(".".join(parts[:index]))
            except ImportError:
                return None
        found = getattr(found, part, None)
    return found


@functools.cache
def parameters_of(dotted: str) -> Parameters | None:
    """The parameters of what a dotted name stands for; None if neither introspection nor a stub knows them.

    Raises `LookupError` when an installed package has no such name.
    """
    target = _resolve(dotted)
    if target is None:
        raise LookupError(dotted)
    candidates = [target]
    if inspect.isclass(target):  # a constructor that passes everything on is described by the one that it calls
        candidates += [base.__init__ for base in target.__mro__[:-1] if "__init__" in vars(base)]
    for candidate in candidates:
        found = _from_signature(candidate)
        if found and found.names - {"self"}:
            return found
    return _from_stub(dotted, target) or found


def _from_signature(target: Any) -> Parameters | None:
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a compiled function that says nothing of itself
        return None
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = frozenset(name for name, kind in kinds.items() if kind in by_keyword)
    return Parameters(names, inspect.Parameter.VAR_KEYWORD in kinds.values())


def _from_stub(dotted: str, target: Any) -> Parameters | None:
    owner, name = _resolve(dotted.rpartition(".")[0]), dotted.rpartition(".")[2]
    if inspect.isclass(target):
        owner, name = target, "__init__"
    if inspect.ismodule(owner):
        return _from_module(getattr(target, "__module__", None) or owner.__name__, name)
    for base in (owner if inspect.isclass(owner) else type(owner)).__mro__:
        for node in _stub(base.__module__).body:
            if isinstance(node, ast.ClassDef) and node.name == base.__name__:
                found = _from_definitions(node.body, name)
                if found:
                    return found
    return None


def _from_module(module: str, name: str) -> Parameters | None:
    """Of a function in the module's stub, or in the stub that it is imported from."""
    body = _stub(module).body
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _from_module(node.module, alias.name)
    return _from_definitions(body, name)


def _from_definitions(body: list[ast.stmt], name: str) -> Parameters | None:
    """Of all overloads together."""
    defined = [node.args for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not defined:
        return None
    names = {argument.arg for arguments in defined for argument in (*arguments.args, *arguments.kwonlyargs)}
    return Parameters(frozenset(names), any(arguments.kwarg for arguments in defined))


@functools.cache
def _stub(module: str) -> ast.Module:
    """The parsed `.pyi` file of a module; an empty one where the package ships none."""
    top, *rest = module.split(".")
    for root in getattr(import_module(top), "__path__", ()):
        for path in (Path(root, *rest).with_suffix(".pyi"), Path(root, *rest, "__init__.pyi")):
            if path.is_file():
                return ast.parse(path.read_text(encoding="utf-8"))
    return ast.Module(body=[], type_ignores=[])
