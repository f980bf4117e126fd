"""Write `examples/api.md`: the public names, from their signatures and docstrings.

    python examples/make_api.py

Signatures are read from the source and not from the running Python, so that every Python writes the same page. A test
compares the page with what this script would write.
"""

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).with_name("api.md")
VERBS = ("convert", "eval", "train", "fuse")  # those that offer functions; `mlxvr` itself offers the rest
COMMAND_LINE = {"main", "make_parser"}
SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")

OPENING = """# The API

What `import mlxvr` offers, and the functions and settings of the verbs. All else is internal and may change.
`python examples/make_api.py` writes this page from docstrings and signatures.
"""

Definition = ast.FunctionDef | ast.ClassDef


@cache
def definitions(module_name: str) -> dict[str, ast.stmt]:
    """The functions, classes and assigned names of a module, by qualified name; of overloads the last."""
    path = inspect.getsourcefile(import_module(module_name))
    assert path is not None, "every module of the package has a source file"
    found: dict[str, ast.stmt] = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = node
                if isinstance(node, ast.ClassDef):
                    collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    found[prefix + ast.unparse(target)] = node

    collect(ast.parse(Path(path).read_text(encoding="utf-8")).body, "")
    return found


def annotation(node: ast.expr) -> str:
    """A type as it is written, without the quotes of a forward reference."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    text = ast.unparse(node)
    return text.replace("'", '"') if "Literal" in text else re.sub(r"'([^']*)'", r"\1", text)


def parameters(node: ast.FunctionDef) -> Iterator[str]:
    """The parameters of a function as they are written, without `self`."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for argument, default in zip(positional, defaults):
        if argument.arg not in ("self", "cls"):
            yield parameter(argument, default)
    if arguments.vararg:
        yield f"*{parameter(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
        yield parameter(argument, default)
    if arguments.kwarg:
        yield f"**{parameter(arguments.kwarg, None)}"


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    """A parameter with its type and default."""
    text = argument.arg if argument.annotation is None else f"{argument.arg}: {annotation(argument.annotation)}"
    return text if default is None else f"{text} = {ast.unparse(default)}"


def signature(name: str, node: ast.FunctionDef) -> str:
    """`def name(parameters) -> result: ...`, on several lines where it is long."""
    result = ": ..." if node.returns is None else f" -> {annotation(node.returns)}: ..."
    listed = list(parameters(node))
    line = f"def {name}({', '.join(listed)}){result}"
    if len(line) <= 100:
        return line
    return "\n".join([f"def {name}(", *(f"    {text}," if text != "*" else "    *," for text in listed), f"){result}"])


def field_line(field: ast.AnnAssign) -> str:
    """A field of a dataclass with its type and its default."""
    text, value = f"{ast.unparse(field.target)}: {annotation(field.annotation)}", field.value
    if isinstance(value, ast.Call):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
        default = given.get("default") or (f"{given['default_factory']}()" if "default_factory" in given else None)
    else:
        default = None if value is None else ast.unparse(value)
    return text if default is None else f"{text} = {default}"


def is_property(node: ast.FunctionDef) -> bool:
    """Whether a method is read like an attribute."""
    return any(ast.unparse(decorator) in ("property", "cached_property") for decorator in node.decorator_list)


def is_accessor(node: ast.FunctionDef) -> bool:
    """Whether a method sets or deletes a property, which has its own entry."""
    return any(ast.unparse(decorator).endswith((".setter", ".deleter")) for decorator in node.decorator_list)


def markdown(docstring: str | None) -> str:
    """A docstring as Markdown: its sections become lists."""
    text = inspect.cleandoc(docstring or "").replace("``", "`")
    lines, written = text.split("\n"), []
    section = False
    item: list[str] = []

    def end_item() -> None:
        if item:
            written.append("- " + " ".join(item))
            item.clear()

    for line in lines:
        heading = line.rstrip(":")
        if heading in SECTIONS and line.endswith(":"):
            end_item()
            section = True
            written += [f"**{heading}**", ""]
        elif section and line and not line.startswith(" "):
            end_item()
            section = False
            written += ["", line]
        elif section and line.strip():
            begins = re.match(r"    (\*{0,2}[\w, *]+): (.*)", line)
            if begins and not line.startswith("     "):
                end_item()
                names = ", ".join(f"`{name.strip()}`" for name in begins[1].split(","))
                item.append(f"{names}: {begins[2]}")
            else:
                item.append(line.strip())
        else:
            end_item()
            written.append(line)
    end_item()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(written)).strip()


def settings(value: type) -> str:
    """The fields of a dataclass that is also a verb's settings: type, default and help."""
    lines = []
    for field in dataclasses.fields(value):
        bases = [base for base in value.__mro__ if base.__module__.startswith("mlxvr")]
        nodes = [definitions(base.__module__).get(f"{base.__qualname__}.{field.name}") for base in bases]
        node = next(node for node in nodes if node is not None)
        assert isinstance(node, ast.AnnAssign), "a field has a type"
        default = "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        nested = field.default_factory if isinstance(field.default_factory, type) else None
        if nested is not None and dataclasses.is_dataclass(nested):
            lines.append(f"- `{field.name}`: {annotation(node.annotation)}")
            lines.append(textwrap.indent(settings(nested), "  "))
            continue
        text = str(field.metadata.get("help", "")).replace("%%", "%")
        lines.append(f"- `{field.name}` ({annotation(node.annotation)}, {default}): {text}".rstrip(": "))
    return "\n".join(lines)


def entry(name: str, value: Any, owner: ModuleType) -> str:
    """A public name: a function, a class with its methods, or an alias of types."""
    module_name = getattr(value, "__module__", "")
    if not module_name.startswith("mlxvr"):
        return alias(name, owner)
    node = definitions(module_name)[value.__qualname__]
    if isinstance(node, ast.FunctionDef):
        return f"### {name}\n\n```python\n{signature(name, node)}\n```\n\n{markdown(value.__doc__)}\n"
    assert isinstance(node, ast.ClassDef), f"{name} is a function or a class"
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    parts = [f"### {name}\n", markdown(ast.get_docstring(node))]
    if issubclass(value, BaseException):
        parts[0] = f"### {name}({bases})\n"
    elif getattr(value, "__total__", None) is not None:
        fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
        parts.append("\n".join(f"- `{ast.unparse(field)}`" for field in fields))
    elif dataclasses.is_dataclass(value):
        if any("help" in field.metadata for field in dataclasses.fields(value)):
            parts.append(settings(value))
        else:
            fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
            shown = [f"    {field_line(field)}" for field in fields]
            parts.insert(1, "```python\n" + "\n".join([f"class {name}:", *shown]) + "\n```\n")
    for child in node.body:
        if not isinstance(child, ast.FunctionDef) or child.name.startswith("_") or is_accessor(child):
            continue
        result = "" if child.returns is None else f": {annotation(child.returns)}"
        heading = f"{child.name}{result}" if is_property(child) else signature(child.name, child)
        parts.append(f"#### {name}.{child.name}\n\n```python\n{heading}\n```\n\n{markdown(ast.get_docstring(child))}")
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def alias(name: str, owner: ModuleType) -> str:
    """A name for a type, as the module that defines it writes it."""
    for module_name in sorted(sys.modules):
        if module_name.startswith("mlxvr."):
            node = definitions(module_name).get(name)
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                return f"### {name}\n\n```python\n{name} = {annotation(node.value)}\n```\n"
    raise LookupError(f"{owner.__name__}.{name} is defined nowhere in the package")


def make_page() -> str:
    """The page."""
    mlxvr = import_module("mlxvr")
    parts = [OPENING, "## mlxvr\n"]
    values = {name: getattr(mlxvr, name) for name in mlxvr.__all__}

    def rank(name: str) -> tuple[int, int]:
        order = (
            "load",
            "Reasoner",
            "Clip",
        )  # a reader's order; then what they return, then errors, each by the alphabet
        if name in order:
            return 0, order.index(name)
        return (2 if isinstance(values[name], type) and issubclass(values[name], BaseException) else 1), 0

    for name in sorted(values, key=lambda name: (rank(name), name)):
        parts.append(entry(name, values[name], mlxvr))
    for verb in VERBS:
        module = import_module(f"mlxvr.{verb}")
        parts.append(f"## mlxvr.{verb}\n")
        names = [name for name in module.__all__ if name not in COMMAND_LINE]
        for name in sorted(names, key=lambda name: (not inspect.isfunction(getattr(module, name)), name)):
            parts.append(entry(name, getattr(module, name), module))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
