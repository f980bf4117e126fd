"""One checkpoint, one behaviour: each of its names gives the same frames, words and threshold."""

import json
import shutil

import numpy as np
import pytest

import mlxvr
from mlxvr.answering.loop import AskRequest
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.checkpoint.defaults import Defaults, find_recipe
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.conversion.quantize import convert
from mlxvr.errors import CheckpointError
from mlxvr.grpo import setup
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.model.prompt import SYSTEM_PROMPT
from tests.checkpoints import write_checkpoint
from tests.clips import write_clip

KNOWN = {"qwen2_5_vl": "VideoAuto-R1-Qwen2.5-VL-7B", "qwen3_vl": "VideoAuto-R1-Qwen3-VL-8B"}
# What the recipes of both say, written down from the paper's evaluation; other fields are the processor files'.
LIMITS = {"fps": 2.0, "min_frames": 4, "max_frames": 256, "frame_min_tokens": 16, "frame_max_tokens": 768}


@pytest.fixture(scope="module", params=sorted(KNOWN))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def unconverted(family, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / KNOWN[family], family)


@pytest.fixture(scope="module")
def names(family, unconverted, tmp_path_factory):
    """The same checkpoint unconverted, in the Hub's cache, and converted from either and once more."""
    root = tmp_path_factory.mktemp("names")
    snapshot = root / f"models--IVUL-KAUST--{KNOWN[family]}" / "snapshots" / ("0" * 39 + "1")
    shutil.copytree(unconverted, snapshot)
    for source, out in ((snapshot, root / "converted"), (unconverted, root / "converted-copy")):
        convert(source, out, bits=8, group_size=32)
    convert(root / "converted", root / "again", dequantize=True)
    return [unconverted, snapshot, root / "converted", root / "converted-copy", root / "again"]


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """More frames than the recipe lets in and fewer than the processor files do."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=280, fps=30, size=(64, 64))


def test_every_name_gives_the_same_prompt(names, family, long_clip):
    prompts, described = [], []
    for folder in names:
        with mlxvr.load(folder) as reasoner, reasoner.open(long_clip, fps=30.0) as clip:
            assert clip.grid[0] == 128  # 256 frames, of 280
            prompt = clip._prompt(reasoner._network, AskRequest("What happens?", ["this", "that"]))
            prompts.append(prompt)
            values = {one.name: one.value for one in reasoner.settings}
            described.append((reasoner.threshold, reasoner.spec, reasoner.system_prompt, values))
    for prompt in prompts[1:]:
        np.testing.assert_array_equal(prompt.ids, prompts[0].ids)
        np.testing.assert_array_equal(prompt.positions, prompts[0].positions)
        assert [one.grid for one in prompt.media] == [one.grid for one in prompts[0].media]
    assert described == [described[0]] * len(names)
    threshold, spec, system_prompt, values = described[0]
    assert threshold == {"qwen2_5_vl": 0.97, "qwen3_vl": 0.98}[family]
    assert system_prompt == SYSTEM_PROMPT
    assert {name: getattr(spec, name) for name in LIMITS} == LIMITS
    assert spec.video_tokens == 16_384
    assert values == {"threshold": threshold, "task_thresholds": {}, "system_prompt": SYSTEM_PROMPT} | {
        name: getattr(spec, name) for name in (*LIMITS, "video_tokens", "image_min_tokens", "image_max_tokens")
    }


def test_training_sees_what_an_answer_sees(names, tmp_path):
    seen = []
    for folder in names[:3]:
        config = TrainConfig(model=str(folder), data=tmp_path / "rows.jsonl", output=tmp_path / "run")
        model = setup.load(config, None)
        seen.append((setup.frame_spec(config, model), model.system_prompt, setup.default_threshold(model)))
        with mlxvr.load(folder) as reasoner:
            assert seen[-1] == (reasoner.spec, reasoner.system_prompt, reasoner.threshold)
    assert seen == [seen[0]] * 3


def test_where_values_come_from(names):
    def sources(folder):
        return Defaults.of(ModelFolder.open(folder)).sources

    name = KNOWN["qwen2_5_vl" if "2.5" in names[0].name else "qwen3_vl"].lower()
    for folder, how in ((names[0], "by its folder's name"), (names[1], "by its Hub id")):
        found = sources(folder)
        assert found["threshold"] == found["max_frames"] == f"recipe {name} ({how})"
        assert found["system_prompt"] == found["task_thresholds"] == "built-in"
    found = sources(names[2])
    assert found["threshold"] == found["max_frames"] == "mlxvr.json"


def test_the_order_of_those_who_say_something(tmp_path):
    """flag > mlxvr.json > recipe > processor files > built-in."""
    folder = write_checkpoint(tmp_path / "m", "qwen2_5_vl")
    processor = json.loads((folder / "video_preprocessor_config.json").read_text())
    (folder / "video_preprocessor_config.json").write_text(json.dumps({**processor, "fps": 3, "max_frames": 50}))

    def resolve(settings=None):
        (folder / "mlxvr.json").write_text(json.dumps(settings or {}))
        return Defaults.of(ModelFolder.open(folder))

    found = resolve()
    assert (found.spec.fps, found.sources["fps"]) == (3.0, "processor files")
    assert (found.threshold, found.sources["threshold"]) == (0.97, "recipe qwen2_5_vl (the family's)")
    assert (found.spec.video_tokens, found.sources["video_tokens"]) == (16_384, "built-in")
    assert (found.spec.image_max_tokens, found.sources["image_max_tokens"]) == (1024, "processor files")
    recorded = {
        "name": "mine",
        "family": "qwen2_5_vl",
        "threshold": 0.5,
        "system_prompt": "Look.",
        "frame_limits": {"fps": 1.0},
    }
    found = resolve({"recipe": recorded})
    source = "recipe mine (recorded in mlxvr.json)"
    assert [found.sources[name] for name in ("threshold", "system_prompt", "fps")] == [source] * 3
    assert (found.threshold, found.system_prompt, found.spec.fps, found.spec.max_frames) == (0.5, "Look.", 1.0, 50)
    own = {"threshold": 0.6, "system_prompt": "Think.", "frame_limits": {"fps": 4.0}, "task_thresholds": {"count": 0.8}}
    found = resolve({"recipe": recorded, **own})
    assert [found.sources[name] for name in ("threshold", "system_prompt", "fps", "task_thresholds")] == [
        "mlxvr.json"
    ] * 4
    assert (found.threshold, found.system_prompt, found.spec.fps) == (0.6, "Think.", 4.0)
    assert found.task_thresholds == {"count": 0.8}
    asked = found.with_flags(threshold=0.7, fps=5.0, max_frames=None)
    assert (asked.threshold, asked.spec.fps, asked.spec.max_frames, asked.system_prompt) == (0.7, 5.0, 50, "Think.")
    assert asked.sources == {**found.sources, "threshold": "flag", "fps": "flag"}


@pytest.mark.parametrize(
    ("config", "card", "recipe"),
    [
        ({"_name_or_path": "IVUL-KAUST/VideoAuto-R1-Qwen3-VL-8B"}, "", "videoauto-r1-qwen3-vl-8b"),
        ({}, "---\nbase_model: IVUL-KAUST/VideoAuto-R1-Qwen3-VL-8B\n---\n", "videoauto-r1-qwen3-vl-8b"),
        (
            {},
            "---\nbase_model:\n- ivul-kaust/VideoAuto-R1-Qwen3-VL-8B\ntags:\n- mlx\n---\n",
            "videoauto-r1-qwen3-vl-8b",
        ),
        ({}, "base_model: IVUL-KAUST/VideoAuto-R1-Qwen3-VL-8B\n", "qwen3_vl"),  # text, not metadata
        ({}, "---\nbase_model: Qwen/Qwen3-VL-8B-Instruct\n---\n", "qwen3_vl"),
        ({"_name_or_path": "IVUL-KAUST/VideoAuto-R1-Qwen2.5-VL-7B"}, "", "qwen3_vl"),  # another family's
        ({"_name_or_path": "/data/VideoAuto-R1-Qwen3-VL-8B"}, "", "qwen3_vl"),
    ],
)
def test_a_checkpoint_finds_its_recipe(config, card, recipe, tmp_path):
    folder = write_checkpoint(tmp_path / "m", "qwen3_vl")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **config}))
    (folder / "README.md").write_text(card)
    assert find_recipe(ModelFolder.open(folder))[0].name == recipe
    convert(folder, tmp_path / "out", bits=8, group_size=32)
    assert json.loads((tmp_path / "out" / "mlxvr.json").read_text())["recipe"]["name"] == recipe


def test_a_folder_name_of_another_family_says_nothing(tmp_path):
    folder = write_checkpoint(tmp_path / KNOWN["qwen3_vl"], "qwen2_5_vl")
    recipe, how = find_recipe(ModelFolder.open(folder))
    assert (recipe.name, how) == ("qwen2_5_vl", "the family's")


def test_what_was_measured_for_a_source_goes_with_it(tmp_path):
    """Its own mlxvr.json, a prompt and thresholds of tasks included, holds for the converted folder too."""
    source = write_checkpoint(tmp_path / "m", "qwen3_vl")
    own = {
        "threshold": 0.9,
        "system_prompt": "Look.",
        "frame_limits": {"max_frames": 8},
        "task_thresholds": {"count": 0.8},
    }
    (source / "mlxvr.json").write_text(json.dumps(own))
    convert(source, tmp_path / "out", bits=8, group_size=32)
    before, after = (Defaults.of(ModelFolder.open(folder)) for folder in (source, tmp_path / "out"))
    assert (before.threshold, before.spec, before.system_prompt) == (after.threshold, after.spec, after.system_prompt)
    assert before.task_thresholds == after.task_thresholds == {"count": 0.8}
    assert (after.threshold, after.system_prompt, after.spec.max_frames) == (0.9, "Look.", 8)


def test_the_bundled_checkpoint_keeps_to_its_processor_files():
    found = Defaults.of(ModelFolder.open(demo_folder() / "checkpoint"))
    assert found.sources["threshold"] == "mlxvr.json"
    assert found.sources["max_frames"] == "processor files"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "threshold 1.5; expected a number from 0 to 1"),
        ({"threshold": True}, "threshold True; expected"),
        ({"task_thresholds": {"count": "high"}}, "task_thresholds.count 'high'; expected"),
        ({"task_thresholds": [0.5]}, "task_thresholds .* expected a table"),
        ({"system_prompt": 3}, "system_prompt 3; expected a text"),
        ({"frame_limits": [1]}, "frame_limits .* expected a table"),
        ({"frame_limits": {"frames": 3}}, "frame_limits.frames; expected some of fps, min_frames"),
        ({"frame_limits": {"max_frames": 1.5}}, "mlxvr.json .*cannot be used: max_frames is 1.5"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(settings, message, tmp_path):
    folder = write_checkpoint(tmp_path / "m", "qwen3_vl")
    (folder / "mlxvr.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        mlxvr.load(folder)


def test_what_an_app_sets_is_its_own():
    with mlxvr.load() as reasoner:
        before = {one.name: one.source for one in reasoner.settings}
        reasoner.system_prompt = "Be brief."
        reasoner.threshold = 0.5
        reasoner.spec = reasoner.spec.with_overrides(max_frames=10)
        after = {one.name: (one.value, one.source) for one in reasoner.settings}
    assert after["system_prompt"] == ("Be brief.", "caller")
    assert after["threshold"] == (0.5, "caller")
    assert after["max_frames"] == (10, "caller")
    changed = {"system_prompt", "threshold", "max_frames"}
    assert {name: source for name, (_, source) in after.items() if name not in changed} == {
        name: source for name, source in before.items() if name not in changed
    }
