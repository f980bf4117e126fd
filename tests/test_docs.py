"""The pages cannot go stale: the `--help` blocks are what the verbs print, named files exist, Python parses.

`python -m tests.test_docs` writes the blocks of examples/commands.md anew, and examples/api.md.
"""

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mlxvr.__main__ import VERBS, main

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
COMMANDS = ROOT / "examples" / "commands.md"


def help_of(verb: str) -> str:
    """What `mlxvr <verb> --help` prints in a terminal of 100 columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        patch.setenv("NO_COLOR", "1")
        return import_module(f"mlxvr.{verb}").make_parser().format_help()


def block(verb: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- help: {verb} -->\n+```text\n(.*?)```\n", re.DOTALL)


@pytest.mark.parametrize("verb", VERBS)
def test_the_page_of_commands_shows_the_help_of_every_verb(verb):
    shown = block(verb).search(COMMANDS.read_text(encoding="utf-8"))
    assert shown, f"examples/commands.md has no help block for {verb}"
    # Line breaks differ between Python versions, words do not.
    assert shown.group(1).split() == help_of(verb).split(), "run: python -m tests.test_docs"


VERB_AS_MODULE = re.compile(rf"(?<!-m )(?<!import )(?<!from )(?<!## )\bmlxvr\.({'|'.join(VERBS)})\b(?!\.\w)")


@pytest.mark.parametrize("verb", VERBS)
def test_a_usage_line_is_a_command_that_exists(verb, capsys):
    # `mlxvr` is the only command that is installed: `mlxvr.eval --help` would be "command not found".
    assert import_module(f"mlxvr.{verb}").make_parser().prog == f"mlxvr {verb}"
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: mlxvr {verb} ")
    assert main([verb, "--no-such-option"]) == 2
    assert f"(see `mlxvr {verb} --help`)" in capsys.readouterr().err


def test_no_message_names_a_verb_as_a_command_that_does_not_exist():
    texts = [text for page in sorted(ROOT.glob("mlxvr/**/*.py")) for text in messages(page)]
    assert len(texts) > 1000
    assert [text for text in texts if " " in text and VERB_AS_MODULE.search(text)] == []


def messages(page):
    """The strings of a module that are no docstrings."""
    tree = ast.parse(page.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {id(node.body[0].value) for node in nodes if isinstance(node, documented) and ast.get_docstring(node)}
    strings = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in strings if id(node) not in docs]


def test_no_page_names_a_verb_as_a_command_that_does_not_exist():
    pages = [ROOT.glob(pattern) for pattern in ("*.md", "convert/*.md", "examples/**/*.md", "tests/**/*.md")]
    for page in (page for found in pages for page in found):
        assert VERB_AS_MODULE.findall(page.read_text(encoding="utf-8")) == [], page


def test_such_commands_are_found():
    assert VERB_AS_MODULE.search("example: mlxvr.eval --model M")
    assert VERB_AS_MODULE.search("fuse it first (mlxvr.fuse)")
    assert not VERB_AS_MODULE.search("python -m mlxvr.eval; mlxvr eval; mlxvr.convert.verify(a, b); mlxvr.evaluation")


PAGES = [
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "convert/*.md", "examples/**/*.md", "tests/**/*.md")
    for page in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    walked = re.findall(r"^([\w/]+\.py)  ", text, re.MULTILINE)
    assert [name for name in walked if not (ROOT / "mlxvr" / name).is_file()] == [], "tests/test_walks.py has the order"
    assert len(walked) > 30


def test_the_field_log_names_tests_that_exist():
    text, module, named = (ROOT / "tests" / "FIELD.md").read_text(encoding="utf-8"), "", 0
    for name in re.findall(r"`((?:test_\w+)?(?:::\w+)*)`", text):
        first, *parts = name.split("::")
        module = first or module  # a name that begins with :: is of the module before it
        source = (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")
        for part in parts:
            assert re.search(rf"(def|class) {part}\b", source), name
        named += 1
    assert named > 40


def test_the_readme_is_short_and_opens_with_the_picture():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 220
    assert any(line.startswith("![") and line.endswith("(examples/demo.svg)") for line in lines[:8])
    for guide in sorted((ROOT / "examples").glob("*.md")):
        assert f"(examples/{guide.name})" in "\n".join(lines), f"README does not link {guide.name}"


def test_the_readme_names_the_two_commands_that_ci_runs():
    text, ci = README.read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("pip install -e .", "-m mlxvr.generate", "pip install -e '.[test]'", "/pytest"):
        assert command in text
    for step in ("install -q -e .", "-m mlxvr.generate", "install -q -e '.[test]'", "/pytest", '-m ""'):
        assert step in ci


if __name__ == "__main__":
    page = COMMANDS.read_text(encoding="utf-8")
    for name in VERBS:
        fresh = f"<!-- help: {name} -->\n\n```text\n{help_of(name)}```\n"
        if block(name).search(page):
            page = block(name).sub(lambda _, fresh=fresh: fresh, page)
        else:
            page = page.replace(f"<!-- help: {name} -->\n", fresh)
    COMMANDS.write_text(page, encoding="utf-8")

    sys.path.insert(0, str(ROOT / "examples"))
    import make_api

    make_api.PAGE.write_text(make_api.make_page(), encoding="utf-8")
