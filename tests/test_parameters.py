"""A function has at most six parameters, or a reason for more, here or in a comment beside it.

A comment is `# 8 parameters: why` on one of the lines of the signature or on the line above.
"""

import ast
import re
from pathlib import Path

import pytest

import mlxvr

PACKAGE = Path(mlxvr.__file__).parent
MOST = 6
COMMENT = re.compile(r"# (\d+) parameters: \S+")

# Public functions whose keywords users write, and inner functions whose arguments are computed apart from each other.
REASONS = {
    "network.__init__": "the parts of a loaded model, put together in one place (`load_model`)",
    "network.hidden": "arrays that a forward pass reads; each pass has its own",
    "decode.prefill": "arrays of a prompt and its cache; rollouts and probes have no `Prompt`",
    "decode.decode": "arrays of a cache and what ends the text; rollouts and probes have no `AskRequest`",
    "decoding.decode_stretch": "what decoders share, and FFmpeg's two handles",
    "loop.run_answer_loop": "tokens come without MLX, so that scripted ones can be tried",
}


def parameters(function):
    """The names of a function's parameters, without self and cls."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def long_signatures(name, source):
    """`module.function` -> count of parameters, of functions with more than `MOST` and no comment on them."""
    result, lines = {}, source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        count = len(parameters(node))
        signature = "\n".join(lines[max(0, node.lineno - 2) : node.body[0].lineno - 1])
        comment = COMMENT.search(signature)
        if count > MOST and (comment is None or int(comment[1]) != count):
            result[f"{name}.{node.name}"] = count
    return result


@pytest.fixture(scope="module")
def signatures():
    result = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        result |= long_signatures(path.stem, path.read_text(encoding="utf-8"))
    return result


def test_no_function_has_more_than_six_parameters_without_a_reason(signatures):
    assert [f"{name} has {count}" for name, count in signatures.items() if name not in REASONS] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(a, b, c, d, e, g): ...", {}),
        ("class A:\n    def f(self, a, b, c, /, d, e, *, g): ...", {}),
        ("def f(a, b, c, /, d, e, *, g, h): ...", {"x.f": 7}),
        ("def f(a, b, c, d, e, g, h):  # 7 parameters: a reason\n    ...", {}),
        ("# 7 parameters: a reason\ndef f(a, b, c, d, e, g, h):\n    ...", {}),
        ("def f(a, b, c, d, e, g, h):  # 8 parameters: of another time\n    ...", {"x.f": 7}),
        ("def f(a, b, c, d, e, g, h):\n    # 7 parameters: a reason\n    ...", {}),
    ],
)
def test_long_signatures_are_found(source, expected):
    assert long_signatures("x", source) == expected
