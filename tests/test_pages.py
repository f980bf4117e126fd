"""Every code block of README and the guides is checked; `BLOCKS` says how, in the order of each page.

runs      shell: each line is parsed by its verb's parser, and those that can run here run, with the bundled
          checkpoint in the place of the 8B one and fewer steps or rows (`SHORTER`); what cannot: `NEEDS`
parses    shell: each line is parsed only: it needs the Hub, other machines, or files of the reader
ci        shell: the two commands of README, which .ci/run runs (`test_docs`)
python    runs, after the page's blocks before it
stubs     Python that is compared with the source (`test_the_api_page_is_what_the_script_writes`)
help      is compared with what the parser prints (`test_docs`)
rows      JSON lines, each a row of a dataset
json      parses
settings  TOML, read as the settings of a training run
recipe    TOML, read as a part of a recipe
drawing   is for people: the house and its walks (`test_walks`)
"""

import ast
import json
import re
import shlex
import shutil
import sys
import tomllib
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest

import mlxvr
from mlxvr.__main__ import VERBS
from mlxvr.checkpoint.bundled import demo_folder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
BLOCKS = {
    "README.md": ["ci", "ci", "python", "parses", "runs", "runs", "runs"],
    "CONTRIBUTING.md": ["parses", "drawing", "drawing", "drawing", "drawing"],
    "convert/README.md": ["parses", "recipe"],
    "examples/api.md": "stubs",
    "examples/commands.md": "help",
    "examples/converting.md": ["runs", "python", "runs", "parses", "parses", "parses"],
    "examples/embedding.md": ["python", "python", "python", "python", "python"],
    "examples/evaluating.md": ["runs", "rows", "parses", "runs", "runs", "python", "parses"],
    "examples/media.md": ["python"],
    "examples/shellgame/README.md": ["parses", "parses", "parses", "parses"],
    "examples/training.md": ["runs", "parses", "python", "runs", "runs", "settings", "runs"],
    "examples/two_macs.md": ["parses", "parses", "json", "parses"],
    "tests/benchmarks/README.md": ["parses"],
    "tests/hardware/cuda.md": ["python"],
}
NEEDS = {"IVUL-KAUST/": "the Hub", "--task": "the files of a benchmark", "lmms_eval": "lmms-eval"}
SHORTER = {  # appended to a command, so that it takes seconds
    "eval": "--max-tokens 48 --max-frames 4 --limit 20",
    "train": "--steps 1 --batch-size 1 --group-size 2 --max-completion-tokens 8 --max-frames 4 --valid-limit 1 "
    "--filter-samples 2 --limit 1",
}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def pages():
    patterns = ("*.md", "convert/*.md", "examples/**/*.md", "tests/**/*.md")
    return sorted(page.relative_to(ROOT).as_posix() for pattern in patterns for page in ROOT.glob(pattern))


@cache
def blocks_of(page):
    """(language, code, kind) of each block of a page."""
    blocks = [(language, code) for _, language, code in FENCE.findall((ROOT / page).read_text(encoding="utf-8"))]
    kinds = BLOCKS.get(page, [])
    kinds = [kinds] * len(blocks) if isinstance(kinds, str) else kinds
    assert len(blocks) == len(kinds), f"{page} has {len(blocks)} blocks: say of each in BLOCKS how it is checked"
    return [(language, code, kind) for (language, code), kind in zip(blocks, kinds)]


def of_kind(*kinds):
    return [
        pytest.param(page, code, id=f"{page}-{number}")
        for page in BLOCKS
        for number, (_, code, kind) in enumerate(blocks_of(page), 1)
        if kind in kinds
    ]


def commands(code):
    """The command lines of a block, as words; comments and prompts are left out."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def module_and_arguments(words):
    """The module that a command runs with `python -m`, and its arguments; None: it runs something else."""
    for place, word in enumerate(words[:-1]):
        if word == "-m" and re.fullmatch(r"(.*/)?python3?", words[place - 1]) and words[place + 1] != "venv":
            return words[place + 1], words[place + 2 :]
    return None


@pytest.mark.parametrize("page", pages())
def test_every_block_has_a_check(page):
    languages = {"python": {"python", "stubs"}, "sh": {"runs", "parses", "ci"}, "toml": {"settings", "recipe"}}
    for language, code, kind in blocks_of(page):
        assert kind in languages.get(language, {"help", "rows", "json", "drawing"}), (page, code)
    outside = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    assert not re.search(r"^ {4,}(python|mlxvr|pip|cd|\.venv)\b", outside, re.MULTILINE), "a command outside of a fence"


@pytest.mark.parametrize(("page", "code"), of_kind("runs", "parses"))
def test_commands_parse(page, code):
    checked = 0
    for words in commands(code):
        found = module_and_arguments(words)
        if found is None:
            assert words[0] in {"cd", "python3", "mlx.distributed_config", ".venv/bin/pytest", ".ci/run"}, words
            continue
        module, arguments = found
        checked += 1
        if module.startswith("mlxvr."):
            verb = module.partition(".")[2]
            assert verb in VERBS
            try:
                import_module(module).make_parser().parse_args(arguments)
            except SystemExit as ends:
                if ends.code != 0:  # 0: a flag that prints something and stops
                    pytest.fail(f"{page}: {shlex.join(words)} is refused by the parser")
        elif module != "lmms_eval":
            path = [folder / f"{module.replace('.', '/')}.py" for folder in (ROOT, ROOT / "examples")]
            source = next(file for file in path if file.is_file()).read_text(encoding="utf-8")
            for flag in (word for word in arguments if word.startswith("--")):
                assert f'"{flag}"' in source, (module, flag)
    assert checked or page == "CONTRIBUTING.md" or "distributed_config" in code


def test_such_commands_are_found():
    assert commands("# a\npython -m mlxvr.eval --data a \\\n  --limit 3  # b\n") == [
        ["python", "-m", "mlxvr.eval", "--data", "a", "--limit", "3"]
    ]
    assert module_and_arguments(["mlx.launch", "--", "~/venv/bin/python", "-m", "mlxvr.train", "--x"]) == (
        "mlxvr.train",
        ["--x"],
    )
    assert module_and_arguments(["python3", "-m", "venv", ".venv"]) is None


@pytest.mark.parametrize(("page", "code"), of_kind("python"))
def test_python_names_what_exists(page, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("mlxvr.") and node.attr[0].isalpha():
            assert hasattr(mlxvr, ast.unparse(node).split(".")[1]), ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mlxvr"):
            for name in node.names:
                assert hasattr(import_module(node.module), name.name), name.name


@pytest.mark.parametrize(("page", "code"), of_kind("stubs"))
def test_stubs_parse(page, code):
    ast.parse(code)


def test_the_api_page_is_what_the_script_writes():
    import make_api

    written = (ROOT / "examples" / "api.md").read_text(encoding="utf-8")
    assert written == make_api.make_page(), "run: python -m tests.test_docs"
    for name in mlxvr.__all__:
        assert re.search(rf"^### {name}\b", written, re.MULTILINE), name
    for verb in ("convert", "eval", "train", "fuse"):
        offered = set(import_module(f"mlxvr.{verb}").__all__) - {"main", "make_parser"}
        section = re.search(rf"^## mlxvr.{verb}$(.*?)(?=^## |\Z)", written, re.MULTILINE | re.DOTALL)[1]
        assert offered <= set(re.findall(r"^### (\w+)", section, re.MULTILINE))


@pytest.mark.parametrize(
    ("docstring", "page"),
    [
        ("One line.", "One line."),
        (
            "Do it.\n\n    Args:\n        a: first,\n            on two lines.\n        b, c: second.\n",
            "Do it.\n\n**Args**\n\n- `a`: first, on two lines.\n- `b`, `c`: second.",
        ),
        (
            "Do it.\n\n    Returns:\n        A number.\n\n    And more.\n",
            "Do it.\n\n**Returns**\n\n- A number.\n\nAnd more.",
        ),
    ],
)
def test_docstrings_become_markdown(docstring, page):
    import make_api

    assert make_api.markdown(docstring) == page


def test_signatures_are_those_of_the_source():
    import make_api

    source = "def f(self, a: 'int | None', *, b: str = 'x', **more: Any) -> 'F': pass"
    assert make_api.signature("f", ast.parse(source).body[0]) == (
        "def f(a: int | None, *, b: str = 'x', **more: Any) -> F: ..."
    )
    assert make_api.field_line(ast.parse("a: int = field(default=3, repr=False)").body[0]) == "a: int = 3"
    assert (
        make_api.field_line(ast.parse("a: list[int] = field(default_factory=list)").body[0]) == "a: list[int] = list()"
    )


@pytest.mark.parametrize(("page", "code"), of_kind("rows"))
def test_rows_are_read(page, code, tmp_path):
    from mlxvr.data.rows import load_rows

    (tmp_path / "rows.jsonl").write_text(code, encoding="utf-8")
    assert len(load_rows(tmp_path / "rows.jsonl")) == len(code.splitlines())


@pytest.mark.parametrize(("page", "code"), of_kind("json"))
def test_json_parses(page, code):
    assert json.loads(code)


@pytest.mark.parametrize(("page", "code"), of_kind("settings"))
def test_settings_are_read(page, code, tmp_path):
    from mlxvr.train import make_parser, read_config

    (tmp_path / "settings.toml").write_text(code, encoding="utf-8")
    config = read_config(make_parser().parse_args(["--config", str(tmp_path / "settings.toml")]))
    assert {str(value) for value in tomllib.loads(code).values()} <= {str(value) for value in vars(config).values()}


@pytest.mark.parametrize(("page", "code"), of_kind("recipe"))
def test_a_recipe_is_read(page, code, tmp_path):
    from mlxvr.checkpoint import recipe

    (tmp_path / "own.toml").write_text(f'family = "qwen3_vl"\nthreshold = 0.98\n{code}', encoding="utf-8")
    (rule,) = recipe.load(tmp_path / "own.toml").quantization.rules
    assert (rule.match, rule.min_bits) == ("language_model.lm_head", 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the pages speak of: the bundled checkpoint in the place of converted ones, a clip, rows."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("path/to/converted", "videoauto-8b-4bit", "videoauto-8b-bf16"):
        shutil.copytree(demo_folder() / "checkpoint", folder / name)
    shutil.copytree(demo_folder() / "clips", folder / "clips")
    shutil.copy(demo_folder() / "clips" / "clip00.mp4", folder / "clip.mp4")
    rows = (demo_folder() / "clips.jsonl").read_text(encoding="utf-8")
    for name in ("clips.jsonl", "train.jsonl", "valid.jsonl"):
        (folder / name).write_text(rows, encoding="utf-8")
    for _, code, kind in blocks_of("examples/training.md"):
        if kind == "settings":
            (folder / "settings.toml").write_text(code, encoding="utf-8")
        if kind == "python":
            (folder / "my_rewards.py").write_text(code, encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in BLOCKS if any(kind == "python" for *_, kind in blocks_of(page))])
def test_python_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    with redirect_stdout(StringIO()) as printed:
        for _, code, kind in blocks_of(page):
            if kind == "python":
                exec(compile(code, page, "exec"), names)
    for name in ("clip", "reasoner"):
        if name in names:
            names[name].close()
    if page == "README.md":
        assert names["answer"].option.text in ("left", "middle", "right")
        assert isinstance(names["event"], mlxvr.Answer)
        assert "FirstAnswer(" in printed.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in BLOCKS if any(kind == "runs" for *_, kind in blocks_of(page))])
def test_commands_run(page, folder, tmp_path, monkeypatch, capsys):
    """In their order, each page in a copy of the folder."""
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(work)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    if page == "examples/converting.md":  # it speaks of an adapter that another page trains
        train = "--model videoauto-8b-4bit --data train.jsonl --valid valid.jsonl --output run"
        assert import_module("mlxvr.train").main([*train.split(), *SHORTER["train"].split()]) == 0
    ran = 0
    for words in (words for _, code, kind in blocks_of(page) if kind == "runs" for words in commands(code)):
        module, arguments = module_and_arguments(words)
        if any(need in shlex.join(words) for need in NEEDS):
            continue
        verb = module.removeprefix("mlxvr.")
        if not {"--resume", "--compare"} & set(arguments):  # a resumed run has its settings, a comparison runs nothing
            arguments = [*arguments, *SHORTER.get(verb, "").split()]
        code = import_module(module).main(arguments)
        printed = capsys.readouterr()
        assert code == 0, (shlex.join(words), printed.err)
        ran += 1
    assert ran > 0
