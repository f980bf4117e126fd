"""Adapters of PEFT and mlx-lm, by hand: what their tensors add to a weight, and what is refused.

`test_peft.py` compares with the `peft` package; these cases need neither it nor torch.
"""

import json
import math
from pathlib import Path

import checkpoints
import mlx.core as mx
import numpy as np
import pytest

from mlxvr.conversion.fusing import fuse
from mlxvr.errors import CheckpointError
from mlxvr.grpo.step.lora import attach_saved, save_adapter
from mlxvr.model.adapter import Adapter
from mlxvr.model.loading import load_model

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "target_modules": ["q_proj"], "use_dora": False}
QUERY = "language_model.model.layers.1.self_attn.q_proj"  # 64 by 64 in Qwen2.5-VL: a square factor shows no axis
NEW, OLD = "base_model.model.model.language_model.layers.1", "base_model.model.model.layers.1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("base") / "model", "qwen2_5_vl")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def write_peft(folder: Path, tensors: dict[str, np.ndarray], **settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **settings}))
    mx.save_safetensors(
        str(folder / "adapter_model.safetensors"), {name: mx.array(array) for name, array in tensors.items()}
    )
    return folder


def pair(module: str, outputs: int, inputs: int, rank: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    return {
        f"{module}.lora_A.weight": draw(rank, inputs, seed=seed),
        f"{module}.lora_B.weight": draw(outputs, rank, seed=seed + 1),
    }


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """A float model's weights by their MLX names."""
    from mlx.utils import tree_flatten

    return {name: np.array(array) for name, array in tree_flatten(load_model(folder).network.parameters())}


def check(base: Path, adapter: Path, tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
    """The adapted network and the fused folder have these weights, and the others as they were."""
    fuse(base, adapter, tmp_path / "fused")
    before, fused = weights_of(base), weights_of(tmp_path / "fused")
    assert fused.keys() == before.keys()
    for name, array in before.items():
        module, _, part = name.rpartition(".")
        wanted = expected.get(module, array) if part == "weight" else array
        np.testing.assert_allclose(fused[name], wanted, rtol=1e-4, atol=1e-4, err_msg=name)
    network = load_model(base, adapter=adapter).network
    for module, weight in expected.items():
        layer = network
        for part in module.split("."):
            layer = layer[int(part)] if part.isdigit() else layer[part]
        rows = draw(5, weight.shape[1], seed=9)
        bias = before.get(f"{module}.bias", 0.0)
        np.testing.assert_allclose(np.array(layer(mx.array(rows))), rows @ weight.T + bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tree", [NEW, OLD, "base_model.model.language_model.layers.1", "model.layers.1"])
def test_a_square_pair_is_added_the_right_way_round(base: Path, tmp_path: Path, tree: str) -> None:
    """W + (6 / 64) B A with a full-rank pair: every matrix is 64 by 64, so shapes cannot tell axes apart."""
    tensors = pair(f"{tree}.self_attn.q_proj", 64, 64, rank=64)
    adapter = write_peft(tmp_path / "a", tensors, r=64)
    a, b = tensors.values()
    check(base, adapter, tmp_path, {QUERY: weights_of(base)[f"{QUERY}.weight"] + 6 / 64 * b @ a})


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 6 / 4),
        ({"use_rslora": True}, 6 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.q_proj": 5}}, 3 / 4),  # the first that matches
        ({"alpha_pattern": {"proj": 3, r"layers\.\d+\.self_attn\.q_proj": 5}}, 5 / 4),  # only from a dot on
        ({"r": 9, "rank_pattern": {"self_attn.q_proj": 4}}, 6 / 4),
        ({"lora_alpha": 0.5, "target_modules": "all-linear"}, 0.5 / 4),
        ({"target_modules": r".*layers\.1\..*q_proj", "lora_dropout": 0.3, "inference_mode": True}, 6 / 4),
    ],
)
def test_the_scale(base: Path, tmp_path: Path, settings: dict, scale: float) -> None:
    tensors = pair(f"{NEW}.self_attn.q_proj", 64, 64)
    adapter = Adapter.open(write_peft(tmp_path / "a", tensors, **settings))
    assert {name: (layer.rank, layer.scale) for name, layer in adapter.layers.items()} == {QUERY: (4, scale)}


def test_modules_of_several_ranks(base: Path, tmp_path: Path) -> None:
    tensors = pair(f"{NEW}.self_attn.q_proj", 64, 64, rank=3) | pair(f"{NEW}.mlp.down_proj", 64, 128, seed=5)
    adapter = write_peft(tmp_path / "a", tensors, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 1})
    before, down = weights_of(base), "language_model.model.layers.1.mlp.down_proj"
    a, b, c, d = tensors.values()
    expected = {QUERY: before[f"{QUERY}.weight"] + 6 / 3 * b @ a, down: before[f"{down}.weight"] + 1 / 4 * d @ c}
    check(base, adapter, tmp_path, expected)


@pytest.mark.parametrize("ending", ["", ".weight", ".default", ".default.weight"])
def test_dora(base: Path, tmp_path: Path, ending: str) -> None:
    """Each row of W + s B A is brought to its learned length (arXiv 2402.09353)."""
    module = f"{NEW}.self_attn.q_proj"
    lengths = np.abs(draw(64)) + 0.5
    tensors = pair(module, 64, 64) | {f"{module}.lora_magnitude_vector{ending}": lengths}
    adapter = write_peft(tmp_path / "a", tensors, use_dora=True)
    a, b, _ = tensors.values()
    summed = weights_of(base)[f"{QUERY}.weight"] + 6 / 4 * b @ a
    check(base, adapter, tmp_path, {QUERY: lengths[:, None] * summed / np.linalg.norm(summed, axis=1, keepdims=True)})


def test_the_vision_tower(base: Path, tmp_path: Path) -> None:
    tensors = pair("base_model.model.model.visual.blocks.0.attn.qkv", 192, 64)
    tensors |= pair("base_model.model.visual.merger.mlp.0", 256, 256, seed=4)
    adapter = write_peft(tmp_path / "a", tensors)
    before, a, b, c, d = weights_of(base), *tensors.values()
    expected = {
        "vision_tower.blocks.0.attn.qkv": before["vision_tower.blocks.0.attn.qkv.weight"] + 6 / 4 * b @ a,
        "vision_tower.merger.mlp.0": before["vision_tower.merger.mlp.0.weight"] + 6 / 4 * d @ c,
    }
    check(base, adapter, tmp_path, expected)


def test_names_with_the_adapters_own_name(base: Path, tmp_path: Path) -> None:
    tensors = pair(f"{NEW}.self_attn.q_proj", 64, 64)
    named = {name.replace(".weight", ".default.weight"): array for name, array in tensors.items()}
    assert set(Adapter.open(write_peft(tmp_path / "a", named)).layers) == {QUERY}
    with pytest.raises(CheckpointError, match=r"holds lora_A of .*q_proj twice"):
        Adapter.open(write_peft(tmp_path / "b", tensors | named))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"peft_type": "IA3"}, "describes a IA3 adapter"),
        ({"bias": "all"}, "sets bias to 'all'"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"lora_bias": True}, "sets lora_bias"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication"),
        ({"target_parameters": ["w"]}, "sets target_parameters"),
        ({"trainable_token_indices": [3]}, "sets trainable_token_indices"),
        ({"use_qalora": True}, "sets use_qalora"),
        ({"what_comes_next": {"x": 1}}, "sets what_comes_next"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"lora_alpha": None}, "no number as lora_alpha"),
        ({"alpha_pattern": {"q_proj(": 3}}, "has patterns that cannot be read"),
        ({"rank_pattern": ["q_proj"]}, "has patterns that cannot be read"),
        ({"r": 8}, "have rank 4, but adapter_config.json says 8"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path: Path, settings: dict, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        Adapter.open(write_peft(tmp_path / "a", pair(f"{NEW}.self_attn.q_proj", 64, 64), **settings))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"{NEW}.input_layernorm.weight": draw(64)}, r"holds .*input_layernorm.weight, which is no LoRA matrix"),
        ({f"{NEW}.self_attn.q_proj.lora_B.bias": draw(64)}, r"holds .*lora_B.bias, which is no LoRA matrix"),
        (
            {"base_model.model.model.language_model.embed_tokens.lora_embedding_A": draw(4, 64)},
            "lora_embedding_A, which is no LoRA matrix",
        ),
        ({f"{NEW}.self_attn.q_proj.lora_A.weight": draw(4, 64)}, r"lacks the lora_b of .*q_proj"),
        (
            {
                "base_model.model.model.visual.patch_embed.proj.lora_A.weight": draw(4, 3, 2, 14, 14),
                "base_model.model.model.visual.patch_embed.proj.lora_B.weight": draw(64, 4, 1, 1, 1),
            },
            r"adapts model.visual.patch_embed.proj, which is no linear module",
        ),
    ],
)
def test_tensors_that_have_no_place(tmp_path: Path, tensors: dict, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        Adapter.open(write_peft(tmp_path / "a", tensors))


def test_an_adapter_of_another_model(base: Path, tmp_path: Path) -> None:
    deeper = write_peft(tmp_path / "a", pair("base_model.model.model.layers.9.self_attn.q_proj", 64, 64))
    with pytest.raises(CheckpointError, match=r"adapts .*layers.9.*no linear module of that name"):
        load_model(base, adapter=deeper)
    with pytest.raises(CheckpointError, match="it was made for another model"):
        fuse(base, deeper, tmp_path / "out")
    wider = write_peft(tmp_path / "b", pair(f"{NEW}.self_attn.q_proj", 64, 96))
    with pytest.raises(CheckpointError, match=r"has the shape \[96, 4\], expected \[64, 4\]"):
        load_model(base, adapter=wider)
    with pytest.raises(CheckpointError, match="it was made for another model"):
        fuse(base, wider, tmp_path / "out")


def test_files_of_a_kind_that_is_not_read(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", pair(f"{NEW}.self_attn.q_proj", 64, 64))
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"x": mx.zeros(1)})
    with pytest.raises(CheckpointError, match="holds both"):
        Adapter.open(folder)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="as a pickle only"):
        Adapter.open(tmp_path / "b")


def write_mlx_lm(folder: Path, prefix: str, layers: list[int], **settings: object) -> tuple[Path, dict]:
    """An adapter as mlx-lm writes it: `layers` have weights."""
    tensors = {}
    for layer in layers:
        for key, outputs, inputs in (("self_attn.q_proj", 64, 64), ("mlp.down_proj", 64, 128)):
            tensors[f"{prefix}{layer}.{key}.lora_a"] = draw(inputs, 8, seed=layer)
            tensors[f"{prefix}{layer}.{key}.lora_b"] = draw(8, outputs, seed=layer + 7)
    folder.mkdir()
    parameters = {"rank": 8, "scale": 0.5, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "a", "iters": 100}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    mx.save_safetensors(
        str(folder / "adapters.safetensors"), {name: mx.array(array) for name, array in tensors.items()}
    )
    return folder, tensors


@pytest.mark.parametrize("prefix", ["model.layers.", "language_model.model.layers."])
def test_mlx_lms_layout(base: Path, tmp_path: Path, prefix: str) -> None:
    """Two of three layers, the last ones, with keys that are counted from a layer."""
    adapter, tensors = write_mlx_lm(tmp_path / "a", prefix, [1, 2])
    before, expected = weights_of(base), {}
    for layer in (1, 2):
        for key in ("self_attn.q_proj", "mlp.down_proj"):
            a, b = (tensors[f"{prefix}{layer}.{key}.{part}"] for part in ("lora_a", "lora_b"))
            module = f"language_model.model.layers.{layer}.{key}"
            expected[module] = before[f"{module}.weight"] + 0.5 * (a @ b).T
    check(base, adapter, tmp_path, expected)


def test_mlx_lms_layout_with_a_layer_missing(base: Path, tmp_path: Path) -> None:
    adapter, _ = write_mlx_lm(tmp_path / "a", "model.layers.", [1], num_layers=-1)
    with pytest.raises(CheckpointError, match=r"lacks language_model.model.layers.0.mlp.down_proj, which its config"):
        load_model(base, adapter=adapter)


def test_training_goes_on_from_a_peft_adapter(base: Path, tmp_path: Path) -> None:
    """What is saved then is MLX's layout of the same weights."""
    tensors = pair(f"{NEW}.self_attn.q_proj", 64, 64) | pair(f"{NEW}.mlp.down_proj", 64, 128, seed=5)
    adapter = write_peft(tmp_path / "a", tensors, lora_dropout=0.1)
    model = load_model(base)
    config = attach_saved(model, adapter)
    assert (config.rank, config.scale, config.dropout, config.dora) == (4, 1.5, 0.1, False)
    assert config.target_modules == ("q_proj", "down_proj")
    save_adapter(tmp_path / "saved", model, config)
    saved = {name: np.array(array) for name, array in mx.load(str(tmp_path / "saved" / "adapters.safetensors")).items()}
    a, b, *_ = tensors.values()
    np.testing.assert_array_equal(saved[f"{QUERY}.lora_a"], a.T)
    np.testing.assert_array_equal(saved[f"{QUERY}.lora_b"], b.T)
    assert Adapter.open(tmp_path / "saved").layers.keys() == Adapter.open(adapter).layers.keys()
    several = write_peft(tmp_path / "b", tensors, alpha_pattern={"q_proj": 2})
    with pytest.raises(CheckpointError, match="several ranks or scales"):
        attach_saved(load_model(base), several)
