"""Messages name what the caller can change: flags that exist, and beside them the keywords of Python."""

import logging
import re
from dataclasses import fields
from importlib import import_module

import numpy as np
import pytest

from mlxvr.__main__ import VERBS
from mlxvr.data.benchmarks import read_benchmark
from mlxvr.data.rows import load_rows
from mlxvr.errors import MlxvrError
from mlxvr.media import load_vision
from mlxvr.media.frame_options import FrameSelection
from mlxvr.model.families.base import FAMILIES
from tests.test_docs import ROOT, messages

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
SPEC = FAMILIES["qwen3_vl"].vision_spec({})
PICTURES = np.zeros((8, 48, 64, 3), dtype=np.uint8)


def flags():
    """The flags of all verbs."""
    parsers = [import_module(f"mlxvr.{verb}").make_parser() for verb in VERBS]
    return {name for parser in parsers for action in parser._actions for name in action.option_strings}


def test_a_flag_in_a_message_is_a_flag_of_a_verb():
    named = {
        (page.name, flag)
        for page in sorted(ROOT.glob("mlxvr/**/*.py"))
        for text in messages(page)
        for flag in FLAG.findall(text)
    }
    assert len(named) > 50
    # `mlxvr --version` belongs to no verb, and "the --q options" are --q-bits and the like.
    assert {(page, flag) for page, flag in named if flag not in flags()} == {
        ("__main__.py", "--version"),
        ("conversion_options.py", "--q"),
    }


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"id": "a", "video": "/clips/a.mp4", "question": "What?", "answer": "B"}\n', encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("cause", "pairs"),
    [
        (lambda path: load_rows(path), [("--media-root", "media_root=")]),
        (lambda path: load_rows(path, media_root=path.parent / "m"), [("--media-root", "media_root=")]),
        (
            lambda path: load_vision(PICTURES[0], SPEC, FrameSelection(start=1.0)),
            [("--start", "start"), ("--end", "end")],
        ),
        (lambda path: read_benchmark("mvbench", path.parent, subtitles=True), [("--subtitles", "subtitles=True")]),
        (lambda path: read_benchmark("mvbench", path), [("--data-root", "data_root=")]),
        (lambda path: read_benchmark("charades", path.parent), [("--data-root", "data_root=")]),
    ],
)
def test_an_error_names_the_flag_and_the_keyword(dataset, cause, pairs):
    with pytest.raises(MlxvrError) as caught:
        cause(dataset)
    for flag, keyword in pairs:
        assert flag in flags()
        assert flag in str(caught.value)
        assert keyword in str(caught.value).replace(flag, "")


def test_the_warning_of_too_many_tokens_names_flags_and_keywords(caplog):
    with caplog.at_level(logging.WARNING):
        load_vision(PICTURES, SPEC.with_overrides(video_tokens=20))
    for keyword in ("video_tokens", "max_frames", "fps"):
        assert keyword in {field.name for field in fields(SPEC)}
        assert f"--{keyword.replace('_', '-')} ({keyword})" in caplog.text
