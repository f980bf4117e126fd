"""A family that nobody has heard of: one class and one recipe, both in this file alone, and everything works.

The family is a renamed Qwen3-VL: the same checkpoint under another `model_type`. So the truth is Qwen3-VL itself, which
has to give the same answers, bytes, gradients and samples. The class is written against the interface, not derived from
Qwen3-VL's; only the network's code is borrowed, since mlx-vlm has none of that name.
"""

import ast
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import write_clip
from small_runs import CLIPS, entries, exact, run, write_small_model

import mlxvr
from mlxvr.checkpoint import recipe as recipes
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.checkpoint.config_normalization import ConfigRules
from mlxvr.checkpoint.defaults import find_recipe
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.conversion.measure import probes
from mlxvr.conversion.measure.layerwise import LayerwiseModel
from mlxvr.convert import convert
from mlxvr.errors import CheckpointError, ConfigError, RecipeError
from mlxvr.evaluation import runner
from mlxvr.evaluation.eval_config import EvalConfig
from mlxvr.evaluation.report import plots
from mlxvr.evaluation.samples import read_samples
from mlxvr.grpo.memory.memory_estimate import estimate
from mlxvr.grpo.memory.workload import Workload
from mlxvr.media.spec import FrameRules
from mlxvr.model.families.base import FAMILIES, Family, family_of, register, token_grid
from mlxvr.model.frame_plan import plan_frame
from mlxvr.model.memory_plan import PromptSize, plan_prompt
from mlxvr.model.positions import VisionBlock

PACKAGE = Path(mlxvr.__file__).parent
ORIGINAL = "qwen3_vl"
RECIPE = """
family = "made_up_vl"
threshold = 0.98

[quantization]
bits = 4
group_size = 32

[[quantization.rules]]
match = "*.mlp.down_proj"
min_bits = 8

[[verification]]
bits = 4
top1 = 0.0
"""
FRAMES = {"max_frames": 2, "video_tokens": 16}


class MadeUpVL(Family):
    """Qwen3-VL under another name."""

    name = "made_up_vl"
    title = "Made-up-VL"
    config_rules = ConfigRules(
        model_type=name,
        text_model_type="made_up_vl_text",
        head_dim=128,
        vision_defaults={"hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "spatial_merge_size": 2},
        rope_theta=5e6,
        mrope_section=(24, 20, 20),
        token_ids={"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4},
    )
    frame_rules = FrameRules(patch_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), counts_whole_clip=True)
    has_head_norms = True
    evaluation_limits = {"max_frames": 6, "video_tokens": 128_000}  # noqa: RUF012
    benchmark_frames = {"mmvu": 2}  # noqa: RUF012

    def network_code(self):
        from mlx_vlm.models import qwen3_vl

        return qwen3_vl

    def build(self, config: Mapping[str, Any]) -> Any:
        full = self.mlx_config(config)
        return FAMILIES[ORIGINAL].build({**full, "model_type": ORIGINAL})

    def vision_layout(self, media, config):
        t, h, w = token_grid(media, config)
        if media.kind == "image":
            return [VisionBlock("", (t, h, w), 1.0)]
        return [VisionBlock(f"<{seconds:.1f} seconds>", (1, h, w), 1.0) for seconds in media.seconds]

    def frame_plan(self, config, height, width):
        vision = config["vision_config"]
        return plan_frame(
            height,
            width,
            merge=vision["spatial_merge_size"],
            head_dim=vision["hidden_size"] // vision["num_heads"],
            table_side=int(vision["num_position_embeddings"] ** 0.5),
            deepstack_layers=self.deepstack_layers(config),
        )

    def deepstack_layers(self, config):
        return tuple(config["vision_config"]["deepstack_visual_indexes"])

    def deepstack_arguments(self, levels, media_mask):
        return {"visual_pos_masks": media_mask, "deepstack_visual_embeds": levels}


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory):
    """The family and its recipe are known while these tests run, and forgotten afterwards."""
    path = tmp_path_factory.mktemp("recipes") / "made_up_vl.toml"
    path.write_text(RECIPE)
    register(MadeUpVL())
    recipes.register(path)
    yield path
    del FAMILIES["made_up_vl"], recipes._shipped()["made_up_vl"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A picture and two texts instead of thirty probes; no plots."""
    chosen = [probe for probe in probes.bundled() if probe.name in ("disc", "text-0", "text-1")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxvr.conversion.measure.verify.bundled", lambda: chosen)
        patch.setattr(plots, "have_matplotlib", lambda: False)
        yield


def renamed(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint with the made-up family's name in config.json."""
    shutil.copytree(folder, target)
    text = (target / "config.json").read_text()
    (target / "config.json").write_text(text.replace(f'"{ORIGINAL}', '"made_up_vl'))
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same random weights as Qwen3-VL and as the made-up family."""
    root = tmp_path_factory.mktemp("families")
    original = write_small_model(root / "original")
    return original, renamed(original, root / "made-up")


def test_the_copy_is_of_the_family(folders):
    original, made_up = (ModelFolder.open(folder) for folder in folders)
    assert (original.family.name, made_up.family.name) == (ORIGINAL, "made_up_vl")
    assert made_up.family.expected_shapes(made_up.config) == original.family.expected_shapes(original.config)
    assert find_recipe(made_up)[0].name == "made_up_vl"
    made_up.check_shapes()


@pytest.mark.parametrize("media", ["clips/clip01.mp4", "image"])
def test_it_answers(folders, tmp_path, media):
    from PIL import Image

    source = demo_folder() / media
    if media == "image":
        source = tmp_path / "image.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(source)
    answers = []
    for folder in folders:
        with mlxvr.load(folder, dtype="float32") as reasoner, reasoner.open(source) as clip:
            answer = clip.ask("What is it?", options=["red", "blue"], mode="think", max_tokens=12)
            answers.append((answer.token_ids, answer.confidence, answer.usage.prompt_tokens, answer.usage.video_tokens))
    assert answers[0] == answers[1]
    assert answers[0][0]


def test_it_is_converted_and_verified(folders, tmp_path):
    """To the bytes of the original's weights under the same recipe, with the verification's verdict."""
    own = tmp_path / "own.toml"
    own.write_text(RECIPE.replace("made_up_vl", ORIGINAL))
    original, made_up = (tmp_path / folder.name for folder in folders)
    expected = convert(folders[0], original, recipe=own, verify=True).verification
    verdict = convert(folders[1], made_up, recipe="made_up_vl", verify=True).verification
    assert json.loads((made_up / "mlxvr.json").read_text())["recipe"]["name"] == "made_up_vl"
    assert json.loads((made_up / "config.json").read_text())["model_type"] == "made_up_vl"
    names = sorted(file.name for file in original.glob("*.safetensors"))
    assert names == sorted(file.name for file in made_up.glob("*.safetensors"))
    for name in names:
        assert (made_up / name).read_bytes() == (original / name).read_bytes(), name
    assert verdict.logits_error == expected.logits_error > 0
    with mlxvr.load(made_up, dtype="float32") as reasoner:
        assert reasoner.identity()["family"] == "made_up_vl"
        assert reasoner.ask(demo_folder() / "clips/clip01.mp4", "What is it?", max_tokens=4).token_ids


def test_it_runs_layer_by_layer(folders):
    logits = []
    for folder in folders:
        model = LayerwiseModel.open(folder, dtype="float32", memory_limit=0)
        prompts = probes.build_prompts(model.model, *media_of(model))
        logits.append([np.array(rows) for rows in model.read(prompts, last=3)[1]])
    for original, made_up in zip(*logits, strict=True):
        np.testing.assert_array_equal(made_up, original)


def media_of(model: LayerwiseModel) -> tuple[Any, Any]:
    """Two probes, one of a picture, and their media."""
    chosen = [probe for probe in probes.bundled() if probe.name in ("disc", "text-0")]
    assert len(chosen) == 2
    return chosen, probes.load_media(chosen, probes.budgeted(model.model.spec))


def test_it_trains(folders, tmp_path):
    """One step: the same completions, rewards, gradient and new weights, bit for bit."""
    results = []
    for folder in folders:
        run(tmp_path / folder.name, folder, steps=1)
        timeless, _, arrays = exact(tmp_path / folder.name)
        results.append((timeless, arrays))
    assert results[0] == results[1]
    [step] = entries(tmp_path / folders[1].name)
    assert step["grad_norm"] > 0


def test_it_is_evaluated(folders, tmp_path):
    """A data file: the samples of the original, but for the time that they took."""
    samples = []
    for folder in folders:
        config = EvalConfig(
            model=folder, data=CLIPS, limit=2, output=tmp_path / folder.name, dtype="float32", max_tokens=8, **FRAMES
        )
        report = runner.evaluate(config)
        samples.append(
            [(one.id, one.total_tokens, one.confidence, one.video_tokens) for one in read_samples(report.samples)]
        )
        assert report.summary.errors == {}
    assert samples[0] == samples[1]


@pytest.mark.parametrize(("task", "frames"), [("charades", 6), ("mmvu", 2)])
def test_a_benchmark_has_its_limits(task, frames):
    assert FAMILIES["made_up_vl"].benchmark_limits(task) == {"max_frames": frames, "video_tokens": 128_000}


def test_a_benchmark_is_evaluated_with_its_limits(folders, tmp_path):
    """4 s at 2 frames a second are 8 frames, of which the family takes 6; 96 pixels a side, 32 to a token."""
    root = tmp_path / "charades"
    (root / "videos").mkdir(parents=True)
    write_clip(root / "videos" / "AAAAA.mp4", frames=120, fps=30, size=(128, 128))
    (root / "charades_sta_test.txt").write_text("AAAAA 0.5 2.0##the ball is seen.\n")
    for folder, pairs in zip(folders, (4, 3)):
        config = EvalConfig(
            task="charades",
            data_root=root,
            model=folder,
            output=tmp_path / folder.name,
            dtype="float32",
            max_tokens=4,
        )
        [sample] = read_samples(runner.evaluate(config).samples)
        assert sample.error is None
        assert sample.video_tokens == pairs * 16


def test_its_memory_is_estimated(folders):
    plans, estimates = [], []
    for folder in folders:
        opened = ModelFolder.open(folder)
        config = opened.family.mlx_config(opened.config)
        plans.append(plan_prompt(config, PromptSize(prompt_tokens=900, answer_tokens=64, grids=[(4, 8, 8)])))
        sizes = {"weight_bytes": 10**7, "adapter_parameters": 10**4, "prompt_tokens": 900, "visual_tokens": 512}
        work = Workload(config=config, **sizes, group_size=4, completion_tokens=64, checkpoint=False, beta=0.1)
        need = estimate(work)
        estimates.append((need.peak, [(flag, less.peak) for flag, less in need.alternatives()]))
    assert plans[0] == plans[1]
    assert estimates[0] == estimates[1]
    assert estimates[0][1]


def test_two_families_cannot_have_one_name(registered, tmp_path):
    class Another(MadeUpVL):
        """Of the same name."""

    register(MadeUpVL())  # again, by another import: nothing happens
    with pytest.raises(ConfigError, match="two families are called 'made_up_vl'"):
        register(Another())
    recipes.register(registered)
    path = tmp_path / "made_up_vl.toml"
    path.write_text(RECIPE.replace("0.98", "0.5"))
    with pytest.raises(RecipeError, match="a recipe called 'made_up_vl' exists already"):
        recipes.register(path)


def test_it_is_among_those_that_an_error_offers():
    with pytest.raises(CheckpointError, match=r"qwen2_5_vl and qwen3_vl and made_up_vl: choose .* or a Made-up-VL"):
        family_of({"model_type": "llama"})


def test_a_file_in_the_folder_is_a_family():
    files = {path.stem for path in (PACKAGE / "model" / "families").glob("*.py")} - {"__init__", "base"}
    assert set(FAMILIES) - {"made_up_vl"} == files


def test_only_the_families_know_their_names():
    """Elsewhere the code names none: not in a text that a program uses, nor in the name of anything."""
    assert {path: found for path in sorted(PACKAGE.rglob("*.py")) if (found := names_of_families(path))} == {}


@pytest.mark.parametrize(
    "line",
    [
        'if family == "qwen3_vl": pass',
        'text = f"of {x} and a Qwen2.5-VL"',
        "is_qwen3 = True",
        "from mlx_vlm.models import qwen3_vl",
        "import mlxvr.model.families.qwen3_vl",
        "def qwen(): pass",
        "def run(*, qwen=1): pass",
        "run(qwen3_vl=512)",
    ],
)
def test_the_search_finds_names(tmp_path, line):
    (tmp_path / "module.py").write_text(f'"""Of Qwen3-VL."""\n# and Qwen2.5-VL\n{line}\n')
    assert names_of_families(tmp_path / "module.py")


def test_docstrings_and_addresses_may_name_them(tmp_path):
    (tmp_path / "module.py").write_text('"""Of Qwen3-VL."""\nexample = "--hf-path IVUL/VideoAuto-R1-Qwen3-VL-8B"\n')
    assert names_of_families(tmp_path / "module.py") == []


def names_of_families(path: Path) -> list[str]:
    """Where a module's code names a family: "line: name". Docstrings, comments and Hub ids are not code."""
    if path.parent == PACKAGE / "model" / "families":
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        for _, value in ast.iter_fields(node):
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and re.search("qwen", re.sub(r"\S+/\S+", "", text), re.IGNORECASE):
                    found.append(f"{getattr(node, 'lineno', 0)}: {text}")
    return found
