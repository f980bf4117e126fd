"""Adapters: what is trained, what is saved and who can read it, and the model without them."""

import json
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import FAMILIES, write_checkpoint
from groups import make_group, stir, tiny_model
from mlx.utils import tree_flatten
from recipes import write_plain

from mlxvr.conversion.fusing import fuse
from mlxvr.conversion.quantize import convert
from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.grpo.step.gradient import group_gradient, group_logprobs
from mlxvr.grpo.step.lora import adapter_state, attach, attach_saved, disable_adapters, lora_weights, save_adapter
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.grpo.step.loss_config import LossConfig
from mlxvr.model.adapter import find_layers
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel

SOME = LoraConfig(rank=4, scale=1.5, target_modules=("q_proj", "down_proj"))


IDS = [5, 9, 2, 77, 31, 8, 8, 120, 300]


def logits_of(model: VideoModel) -> np.ndarray:
    positions = mx.broadcast_to(mx.arange(9), (3, 1, 9))
    hidden = model.hidden(mx.array([IDS]), positions)
    return np.array(model.logits(hidden).astype(mx.float32))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_trained(family, dora, tmp_path):
    model = tiny_model(tmp_path / "m", family, bits=4)
    before, untouched = logits_of(model), {name for name, _ in tree_flatten(model.network.parameters())}
    attach(model, LoraConfig(rank=4, dora=dora), seed=0)
    trained = dict(tree_flatten(model.network.trainable_parameters()))
    parts = {"lora_a", "lora_b", "m"} if dora else {"lora_a", "lora_b"}
    expected = {
        f"language_model.model.layers.{layer}.{group}.{key}.{part}"
        for layer in range(3)
        for group, keys in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for key in (f"{one}_proj" for one in keys)
        for part in parts
    }
    assert trained.keys() == expected == lora_weights(model).keys()
    assert {array.dtype for array in trained.values()} == {mx.float32}
    assert trained["language_model.model.layers.0.mlp.down_proj.lora_a"].shape == (128, 4)
    assert trained["language_model.model.layers.0.mlp.down_proj.lora_b"].shape == (4, 64)
    frozen = {name.replace(".linear.", ".") for name, _ in tree_flatten(model.network.parameters())} - expected
    assert frozen == untouched
    if dora:
        assert error(logits_of(model), before) < 1e-5
    else:
        np.testing.assert_array_equal(logits_of(model), before)


def test_the_seed_decides_where_training_begins(tmp_path):
    def begin(seed: int) -> dict[str, np.ndarray]:
        model = tiny_model(tmp_path / "m", "qwen3_vl")
        mx.random.seed(len(list(tmp_path.iterdir())) + seed)  # the global state plays no part
        attach(model, SOME, seed=seed)
        return {name: np.array(array) for name, array in lora_weights(model).items()}

    one, same, other = begin(3), begin(3), begin(4)
    first = [name for name in one if name.endswith("lora_a")]
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
    for name in first:
        assert np.abs(one[name] - other[name]).max() > 0
        limit = one[name].shape[0] ** -0.5
        assert 0.8 * limit < np.abs(one[name]).max() <= limit
    assert len({one[name].tobytes() for name in first}) == len(first)  # no two layers alike


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dora", [False, True])
def test_disable_adapters_is_the_base_model(family, dora, bits, tmp_path):
    model = tiny_model(tmp_path / "m", family, bits=bits)
    group = make_group(model)
    base, base_logprobs = logits_of(model), group_logprobs(model, group)
    attach(model, LoraConfig(rank=4, dora=dora), seed=0)
    stir(model)
    adapted = logits_of(model)
    assert error(adapted, base) > 0.05
    with disable_adapters(model):
        np.testing.assert_array_equal(logits_of(model), base)
        np.testing.assert_array_equal(group_logprobs(model, group), base_logprobs)
    np.testing.assert_array_equal(logits_of(model), adapted)
    with pytest.raises(KeyError), disable_adapters(model):
        raise KeyError
    np.testing.assert_array_equal(logits_of(model), adapted)


def test_a_snapshot_is_the_adapter_as_it_was(tmp_path):
    model = tiny_model(tmp_path / "m", "qwen3_vl")
    attach(model, SOME, seed=0)
    stir(model, seed=1)
    begun, start = logits_of(model), adapter_state(model)
    stir(model, seed=2)
    now = logits_of(model)
    with disable_adapters(model, start):
        np.testing.assert_array_equal(logits_of(model), begun)
    np.testing.assert_array_equal(logits_of(model), now)
    assert error(now, begun) > 0.01


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bits", [0, 4])
def test_who_can_read_what_is_saved(family, dora, bits, tmp_path):
    """`load_model`, stock mlx-vlm, `attach_saved` and `fuse` all give the model that was trained."""
    import mlx_vlm
    from mlx_vlm.trainer.peft import load_adapters

    folder, adapter = tmp_path / "model", tmp_path / "run"
    source = write_checkpoint(tmp_path / "source", family)
    convert(source, folder, recipe=write_plain(tmp_path, family), bits=bits, dtype="float32")
    model = load_model(folder)
    config = LoraConfig(rank=4, scale=1.5, dora=dora, target_modules=("q_proj", "down_proj"))
    attach(model, config, seed=0)
    stir(model)
    adapted = logits_of(model)
    assert error(adapted, logits_of(load_model(folder))) > 0.05
    adapter.mkdir()
    (adapter / "metrics.jsonl").write_text("mine")
    save_adapter(adapter, model, config)
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
        "metrics.jsonl",
    ]

    np.testing.assert_array_equal(logits_of(load_model(folder, adapter=adapter)), adapted)

    stock = load_model(folder)
    load_adapters(stock.network, adapter)
    np.testing.assert_array_equal(logits_of(stock), adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its processor's
        whole, _ = mlx_vlm.load(str(folder), adapter_path=str(adapter))
    assert error(np.array(whole(mx.array([IDS]), None, None).logits.astype(mx.float32)), adapted) < 1e-5

    further = load_model(folder)
    assert attach_saved(further, adapter) == config
    np.testing.assert_array_equal(logits_of(further), adapted)
    assert dict(tree_flatten(further.network.trainable_parameters())).keys() == lora_weights(model).keys()
    stir(further, seed=5)
    save_adapter(adapter, further, config)
    np.testing.assert_array_equal(logits_of(load_model(folder, adapter=adapter)), logits_of(further))

    save_adapter(adapter, model, config)
    fuse(folder, adapter, tmp_path / "fused", dequantize=True)
    assert error(logits_of(load_model(tmp_path / "fused")), adapted) < 1e-5
    if bits:
        fuse(folder, adapter, tmp_path / "packed")
        rounding = error(logits_of(load_model(folder)), logits_of(load_model(source)))  # what 4 bits cost anyway
        assert error(logits_of(load_model(tmp_path / "packed")), adapted) < 1.5 * rounding


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_dora_around_every_number_of_bits(bits, tmp_path):
    """mlx-vlm takes the width of 3-, 5- and 6-bit weights for a smaller one; ours are saved and read as they are."""
    settings = {"hidden_size": 96, "intermediate_size": 192}
    folder = write_checkpoint(tmp_path / "m", "qwen3_vl", text=settings)
    models = []
    for _ in range(2):
        model = load_model(folder)
        nn.quantize(model.network.language_model, group_size=32, bits=bits)
        models.append(model)
    model, other = models
    base, config = logits_of(model), LoraConfig(rank=4, dora=True)
    attach(model, config, seed=0)
    assert lora_weights(model)["language_model.model.layers.1.mlp.down_proj.lora_a"].shape == (192, 4)
    assert error(logits_of(model), base) < 1e-5
    stir(model)
    gradient, _ = group_gradient(model, make_group(model), np.array([1, -1, 0.5, 0]), config=LossConfig(beta=0.0))
    assert all(mx.isfinite(array).all() for _, array in tree_flatten(gradient))
    save_adapter(tmp_path / "run", model, config)
    assert attach_saved(other, tmp_path / "run") == config
    np.testing.assert_array_equal(logits_of(other), logits_of(model))


def test_lora_around_packed_floats(tmp_path):
    """mxfp4 has scales and no biases."""
    model = tiny_model(tmp_path / "m", "qwen3_vl")
    nn.quantize(model.network.language_model, group_size=32, bits=4, mode="mxfp4")
    base = logits_of(model)
    for dora in (False, True):
        attach(model, LoraConfig(rank=4, dora=dora), seed=0)
        stir(model)
        gradient, _ = group_gradient(model, make_group(model), np.array([1, -1, 0.5, 0]), config=LossConfig(beta=0.0))
        assert all(mx.isfinite(array).all() for _, array in tree_flatten(gradient))
        with disable_adapters(model):
            np.testing.assert_array_equal(logits_of(model), base)
        for name, layer in find_layers(model.network).items():
            parent = model.network
            for part in name.split(".")[:-1]:
                parent = parent[int(part)] if part.isdigit() else parent[part]
            parent[name.rpartition(".")[2]] = layer.linear


def test_a_stopped_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = tiny_model(tmp_path / "m", "qwen3_vl")
    attach(model, SOME, seed=0)
    save_adapter(tmp_path / "run", model, SOME)
    old = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    stir(model)

    def stop(*_: object, **__: object) -> None:
        raise RuntimeError("[save_safetensors] no space left on device")

    monkeypatch.setattr(mx, "save_safetensors", stop)
    with pytest.raises(ConfigError, match="cannot be written"):
        save_adapter(tmp_path / "run", model, SOME)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == old


def test_what_is_refused(tmp_path):
    model = tiny_model(tmp_path / "m", "qwen3_vl")
    with pytest.raises(ConfigError, match="no adapter to save"):
        save_adapter(tmp_path / "run", model, SOME)
    attach(model, SOME, seed=0)
    with pytest.raises(ConfigError, match="has an adapter already"):
        attach(model, SOME, seed=0)
    save_adapter(tmp_path / "run", model, SOME)
    with pytest.raises(ConfigError, match="has an adapter already"):
        attach_saved(model, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"] = ["vision_tower.blocks.0.attn.qkv"]
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(config))
    weights = {f"vision_tower.blocks.0.attn.qkv.{part}": mx.zeros((64, 4)) for part in ("lora_a",)}
    weights["vision_tower.blocks.0.attn.qkv.lora_b"] = mx.zeros((4, 192))
    mx.save_safetensors(str(tmp_path / "run" / "adapters.safetensors"), weights)
    with pytest.raises(CheckpointError, match="fuse it, and train the fused model"):
        attach_saved(tiny_model(tmp_path / "other", "qwen3_vl"), tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank 0"),
        ({"scale": 0.0}, "scale 0.0"),
        ({"scale": float("nan")}, "scale nan"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"target_modules": ()}, "no module"),
        ({"target_modules": ("q_proj", "lm_head")}, "'lm_head'"),
    ],
)
def test_values_that_cannot_be_used(options, words):
    with pytest.raises(ConfigError, match=words):
        LoraConfig(**options)


def test_adapters_on_disk_are_what_the_fields_say(tmp_path):
    model = tiny_model(tmp_path / "m", "qwen3_vl")
    attach(model, SOME, seed=0)
    save_adapter(tmp_path / "run", model, SOME)
    written = json.loads(Path(tmp_path / "run" / "adapter_config.json").read_text())
    names = [
        f"language_model.model.layers.{layer}.{name}"
        for layer in range(3)
        for name in ("mlp.down_proj", "self_attn.q_proj")
    ]
    base = written.pop("base")
    assert sorted(base) == ["bits", "dtype", "fingerprint", "sample"]
    assert base["fingerprint"] == tiny_model(tmp_path / "same", "qwen3_vl").fingerprint
    assert written == {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": 4, "scale": 1.5, "dropout": 0.0, "keys": names},
    }
