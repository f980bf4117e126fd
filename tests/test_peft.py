"""Adapters that the `peft` package made and saved, against what transformers computes with them (CPU, float32)."""

import json
import re
from pathlib import Path

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import random_media

from mlxvr.conversion.fusing import fuse
from mlxvr.conversion.quantize import convert
from mlxvr.media.patches import normalise
from mlxvr.model.loading import load_model
from mlxvr.model.prompt import build_prompt

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),  # of names that peft still uses
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

TOLERANCE = 1e-4  # relative to the largest logit
LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
# What peft is asked for; None: a name of its own in each family's vision tower.
SETTINGS = {
    "a list": {"target_modules": ["q_proj", "v_proj"]},
    "a regular expression": {"target_modules": LANGUAGE},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": LANGUAGE,
        "rank_pattern": {"q_proj": 2, r"layers.1.*down_proj": 16},
        "alpha_pattern": {"self_attn.k_proj": 5, "down_proj": 1},
    },
    "rank-stabilised": {"target_modules": ["o_proj", "up_proj"], "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora and patterns": {"target_modules": LANGUAGE, "use_dora": True, "rank_pattern": {"v_proj": 3}},
    "the vision tower": {"target_modules": r".*visual\.(blocks\.\d+\.attn\.(qkv|proj)|.*merger.*|.*mlp\..*)"},
    "the head": {"target_modules": ["lm_head", "k_proj"]},
}


def make_adapter(base: Path, family: str, folder: Path, settings: dict):
    """An adapter with random weights that peft saved, and the network that it belongs to."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from reference import Reference

    reference = Reference(base, family)
    if settings["target_modules"].__class__ is str and settings["target_modules"] != "all-linear":
        pattern = re.compile(settings["target_modules"])  # linear modules alone: peft refuses others
        chosen = [name for name, module in reference.model.named_modules() if isinstance(module, torch.nn.Linear)]
        settings = settings | {
            "target_modules": "|".join(re.escape(name) for name in chosen if pattern.fullmatch(name))
        }
    adapted = peft.get_peft_model(reference.model, peft.LoraConfig(r=8, lora_alpha=12, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    reference.model = adapted.base_model.model.eval()
    return reference


def ask(model):
    name = model.family.name
    media = [
        random_media(name, "video", (4, 6, 8), second_per_grid=1.5),
        random_media(name, "image", (1, 8, 4), seed=1),
    ]
    return build_prompt(model.tokenizer, model.family, model.config, media, "What happens?", options=["yes", "no"])


def logits_of(model, prompt) -> np.ndarray:
    hidden = model.hidden(
        mx.array(prompt.ids)[None],
        mx.array(prompt.positions)[:, None],
        features=model.encode(prompt.media),
        media_mask=prompt.media_mask[None],
    )
    return np.array(model.logits(hidden)[0].astype(mx.float32))


@pytest.fixture(scope="module", params=checkpoints.FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("peft") / "model", request.param)


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_equal_pefts(base: Path, tmp_path: Path, name: str) -> None:
    """Loaded on top of the network, and fused into it."""
    family = json.loads((base / "config.json").read_text())["model_type"]
    reference = make_adapter(base, family, tmp_path / "adapter", SETTINGS[name])
    from reference import relative_error

    plain, adapted = load_model(base), load_model(base, adapter=tmp_path / "adapter")
    prompt = ask(plain)
    pixels = [normalise(item.patches, plain.spec) for item in prompt.media]
    expected = reference.logits(reference.inputs(prompt.ids, prompt.media, pixels))
    assert relative_error(logits_of(adapted, prompt), expected) <= TOLERANCE
    assert relative_error(logits_of(plain, prompt), expected) > 100 * TOLERANCE  # the adapter does something
    fuse(base, tmp_path / "adapter", tmp_path / "fused")
    assert relative_error(logits_of(load_model(tmp_path / "fused"), prompt), expected) <= TOLERANCE


def test_on_quantized_weights_and_converted(tmp_path: Path) -> None:
    """On 8-bit weights and, fused into floats that are then converted: near what peft computes."""
    base = checkpoints.write_checkpoint(tmp_path / "base", "qwen3_vl")
    reference = make_adapter(base, "qwen3_vl", tmp_path / "adapter", SETTINGS["dora and patterns"])
    from reference import relative_error

    convert(base, tmp_path / "packed", bits=8, dtype="float32")
    fuse(base, tmp_path / "adapter", tmp_path / "fused")
    convert(tmp_path / "fused", tmp_path / "converted", bits=8, dtype="float32")
    on_packed = load_model(tmp_path / "packed", adapter=tmp_path / "adapter")
    prompt = ask(on_packed)
    pixels = [normalise(item.patches, on_packed.spec) for item in prompt.media]
    expected = reference.logits(reference.inputs(prompt.ids, prompt.media, pixels))
    assert relative_error(logits_of(on_packed, prompt), expected) < 0.05
    assert relative_error(logits_of(load_model(tmp_path / "converted"), prompt), expected) < 0.05
    assert relative_error(logits_of(load_model(tmp_path / "packed"), prompt), expected) > 0.1
