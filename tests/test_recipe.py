"""Recipes: the files that ship, the README that explains them, and what is refused."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlxvr.checkpoint import recipe
from mlxvr.checkpoint.recipe import FrameLimits, KeyRule, Precision, Quantization, Recipe, Rule, VerificationLimits
from mlxvr.errors import CheckpointError, RecipeError
from mlxvr.model.families.base import FAMILIES

FOLDER = Path(__file__).parent.parent / "convert"
MINIMAL = 'family = "qwen3_vl"\nthreshold = 0.5\n'


@pytest.fixture
def read(tmp_path):
    def write_and_load(text: str) -> Recipe:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return recipe.load(path)

    return write_and_load


def test_the_shipped_recipes():
    assert recipe.available() == sorted(path.stem for path in FOLDER.glob("*.toml"))
    expected = {
        "videoauto-r1-qwen2.5-vl-7b": ("IVUL-KAUST/VideoAuto-R1-Qwen2.5-VL-7B", "qwen2_5_vl", 0.97),
        "videoauto-r1-qwen3-vl-8b": ("IVUL-KAUST/VideoAuto-R1-Qwen3-VL-8B", "qwen3_vl", 0.98),
        "qwen2_5_vl": ("", "qwen2_5_vl", 0.97),
        "qwen3_vl": ("", "qwen3_vl", 0.98),
        "shellgame": ("", "qwen3_vl", 0.97),
    }
    shipped = {name: recipe.load(name) for name in recipe.available()}
    assert {name: (r.source, r.family, r.threshold) for name, r in shipped.items()} == expected
    for shipped_recipe in shipped.values():  # the vision tower is kept by all of them
        assert shipped_recipe.precision("vision_tower.blocks.0.attn.qkv") is None
        assert shipped_recipe.precision("language_model.lm_head") == Precision(bits=8, group_size=64)
        layer = "language_model.model.layers.3"
        assert shipped_recipe.precision(f"{layer}.mlp.down_proj") == Precision(bits=6, group_size=64)
        assert shipped_recipe.precision(f"{layer}.self_attn.q_proj") == Precision(bits=4, group_size=64)
        # The embedding is packed like the rest, unless it is the head.
        embedding = "language_model.model.embed_tokens"
        assert shipped_recipe.precision(embedding) == Precision(bits=4, group_size=64)
        assert shipped_recipe.with_tied_head().precision(embedding) == Precision(bits=8, group_size=64)
        eight = shipped_recipe.with_quantization(bits=8)
        assert eight.precision(f"{layer}.mlp.down_proj") == eight.precision("language_model.lm_head")


def test_a_family_finds_its_recipe_and_a_known_checkpoint_its_own():
    assert recipe.for_config({"model_type": "qwen3_vl"}).name == "qwen3_vl"
    assert recipe.for_config({"model_type": "qwen2_5_vl"}).name == "qwen2_5_vl"
    assert recipe.for_source("ivul-kaust/videoauto-r1-qwen3-vl-8b").name == "videoauto-r1-qwen3-vl-8b"
    assert recipe.for_source("Qwen/Qwen3-VL-4B-Instruct") is None
    assert recipe.for_source("") is None


def test_every_family_has_a_recipe():
    for family in FAMILIES.values():
        assert recipe.for_config({"model_type": family.name}).family == family.name


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}, {"model_type": "shellgame"}, {"model_type": None}])
def test_another_family_is_refused(config):
    with pytest.raises(CheckpointError, match="expected one of qwen2_5_vl, qwen3_vl"):
        recipe.for_config(config)


def test_finding_a_recipe_needs_neither_mlx_nor_the_hub():
    code = "import sys; from mlxvr.checkpoint import recipe; recipe.for_config({'model_type': 'qwen3_vl'}); "
    code += "assert not {'mlx', 'mlx.core', 'huggingface_hub', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults(read):
    mine = read(MINIMAL)
    assert mine == Recipe(name="mine", family="qwen3_vl", threshold=0.5)
    assert mine.quantization == Quantization(bits=4, group_size=64, dtype="bfloat16", keep=("vision_tower.*",))
    assert mine.frame_limits == FrameLimits()


def test_every_key_is_read(read):
    mine = read(
        """
        family = "qwen3_vl"
        threshold = 1
        description = "d"
        source = "org/name"
        revision = "abc"
        license = "mit"
        base_model = "org/base"
        [quantization]
        bits = 6
        group_size = 32
        dtype = "float16"
        keep = ["vision_tower.*", "language_model.model.layers.0.*"]
        [[quantization.rules]]
        match = "*.lm_head"
        [[quantization.rules]]
        match = "*.v_proj"
        min_bits = 2
        group_size = 128
        [frame_limits]
        fps = 1
        min_frames = 2
        max_frames = 64
        frame_min_tokens = 4
        frame_max_tokens = 8
        video_tokens = 512
        image_min_tokens = 16
        image_max_tokens = 32
        """
    )
    values = (1.0, 2, 64, 4, 8, 512, 16, 32)
    assert mine == Recipe(
        name="mine",
        family="qwen3_vl",
        threshold=1.0,
        description="d",
        source="org/name",
        revision="abc",
        license="mit",
        base_model="org/base",
        quantization=Quantization(
            bits=6,
            group_size=32,
            dtype="float16",
            keep=("vision_tower.*", "language_model.model.layers.0.*"),
            rules=(Rule(match="*.lm_head", min_bits=8), Rule(match="*.v_proj", min_bits=2, group_size=128)),
        ),
        frame_limits=FrameLimits(
            **dict(zip([field.name for field in dataclasses.fields(FrameLimits)], values, strict=True))
        ),
    )
    assert isinstance(mine.threshold, float)
    assert mine.precision("language_model.model.layers.0.mlp.up_proj") is None
    assert mine.precision("language_model.model.layers.1.mlp.up_proj") == Precision(bits=6, group_size=32)
    assert mine.precision("language_model.lm_head") == Precision(bits=8, group_size=32)
    # A rule is a floor: 2 bits do not lower the 6 of the rest.
    assert mine.precision("language_model.model.layers.1.self_attn.v_proj") == Precision(bits=6, group_size=128)


def test_flags_stand_above_the_recipe(read):
    mine = read(MINIMAL).with_quantization(bits=8, dtype="float32")
    assert mine.quantization == Quantization(bits=8, group_size=64, dtype="float32")
    assert read(MINIMAL).with_quantization(bits=0).precision("language_model.lm_head") is None
    with pytest.raises(RecipeError, match="bits = 7; expected one of"):
        read(MINIMAL).with_quantization(bits=7)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL + "treshold = 0.5", "unknown key 'treshold'"),
        (MINIMAL + 'name = "x"', "the file's name is the recipe's name"),
        (MINIMAL + "[quantization]\nbit = 4", "unknown key 'quantization.bit'"),
        (MINIMAL + "[frame_limits]\nframes = 4", "unknown key 'frame_limits.frames'"),
        (MINIMAL + '[[quantization.rules]]\nmatch = "*"\nbits = 4', "unknown key 'quantization.rules.bits'"),
        (MINIMAL + "[[quantization.rules]]\nmin_bits = 4", "'quantization.rules.match' is missing"),
        (MINIMAL + '[[quantization.rules]]\nmatch = "*"\nmin_bits = 7', "min_bits = 7; expected one of"),
        (MINIMAL + '[[quantization.rules]]\nmatch = "*"\ngroup_size = 5', "group_size = 5; expected one of"),
        (MINIMAL + "[quantization]\nbits = 7", "quantization.bits = 7; expected one of"),
        (MINIMAL + "[quantization]\nbits = true", "quantization.bits = True has the wrong type; expected int"),
        (MINIMAL + '[quantization]\nbits = "4"', "expected int"),
        (MINIMAL + "[quantization]\ngroup_size = 48", "quantization.group_size = 48"),
        (MINIMAL + '[quantization]\ndtype = "int8"', "quantization.dtype = 'int8'"),
        (MINIMAL + '[quantization]\nkeep = "vision_tower.*"', "quantization.keep"),
        (MINIMAL + "[quantization]\nkeep = [1]", "expected str"),
        (MINIMAL + "quantization = 4", "quantization = 4 has the wrong type"),
        (MINIMAL + "[frame_limits]\nmax_frames = 0", "frame_limits.max_frames = 0; expected a number above 0"),
        (MINIMAL + "[frame_limits]\nmax_frames = 2.5", "expected int"),
        (MINIMAL + "[frame_limits]\nfps = nan", "frame_limits.fps = nan"),
        ('family = "qwen3_vl"\nthreshold = 1.5', "threshold = 1.5; expected a number from 0 to 1"),
        ('family = "qwen3_vl"\nthreshold = nan', "threshold = nan"),
        ('family = "qwen3_vl"', "'threshold' is missing"),
        ("threshold = 0.5", "'family' is missing"),
        ("family = ", "not valid TOML"),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(read, text, says):
    with pytest.raises(RecipeError) as caught:
        read(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(RecipeError, match="no recipe is called 'qwen4'; expected one of qwen2_5_vl, "):
        recipe.load("qwen4")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        recipe.load(tmp_path / "gone.toml")
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        recipe.load(folder)


def test_the_readme_documents_every_key_and_every_recipe():
    text = (FOLDER / "README.md").read_text()
    tables = {"## Keys": Recipe, "### `[quantization]`": Quantization, "### `[[quantization.rules]]`": Rule}
    tables |= {
        "### `[frame_limits]`": FrameLimits,
        "### `[[key_rules]]`": KeyRule,
        "### `[[verification]]`": VerificationLimits,
    }
    for heading, cls in tables.items():
        section = text.split(heading + "\n")[1]
        section = section.split("### At the top")[1] if cls is Recipe else section
        documented = re.findall(r"^\| `(\w+)` \|", section.split("\n#")[0], flags=re.MULTILINE)
        declared = {field.name for field in dataclasses.fields(cls)}
        assert set(documented) == declared - {"name", "quantization", "frame_limits", "key_rules", "verification"}, (
            heading
        )
    recipes = re.findall(r"^\| `([\w.\-]+)` \| [^|]+\| (0\.\d+) \|$", text, flags=re.MULTILINE)
    assert sorted(recipes) == [(name, str(recipe.load(name).threshold)) for name in recipe.available()]


def test_the_readme_states_the_usual_limits():
    text = (FOLDER / "README.md").read_text().split("### `[[verification]]`")[1]
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, flags=re.M)
    usual = Recipe(name="x", family="qwen3_vl", threshold=0.5).verification
    assert [tuple(map(float, row)) for row in rows] == [
        (one.bits, one.logits_error, one.kl, one.confidence_drift, one.flipped_exits) for one in usual
    ]


def test_limits_are_those_of_the_most_bits_that_the_weights_have(read):
    mine = read(MINIMAL)
    assert [mine.limits_for(bits).bits for bits in (16, 8, 7.9, 4.7, 4, 3, 2)] == [16, 8, 6, 4, 4, 3, 3]
    own = read(MINIMAL + "[[verification]]\nbits = 4\nkl = 0.5\n")
    assert own.limits_for(16) == own.limits_for(2) == VerificationLimits(bits=4, kl=0.5)
    with pytest.raises(RecipeError, match=r"verification.kl = -1.0; expected a number of at least 0"):
        read(MINIMAL + "[[verification]]\nbits = 4\nkl = -1\n")


def test_the_readme_states_the_real_defaults():
    text = (FOLDER / "README.md").read_text().split("### `[[verification]]`")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+\| ([^|]+?) \|", text.split("### `[quantization]`")[1], flags=re.M))
    defaults = Quantization()
    assert rows["bits"] == str(defaults.bits)
    assert rows["dtype"] == f"`{defaults.dtype}`"
    assert rows["keep"] == '`["vision_tower.*"]`'
    assert defaults.keep == ("vision_tower.*",)
    assert rows["min_bits"] == str(Rule(match="*").min_bits)
