"""Fusing an adapter: the fused model is the adapted one, and what the adapter does not touch stays as it was."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import FAMILIES, write_checkpoint
from recipes import write_plain

from mlxvr.conversion.fusing import fuse
from mlxvr.conversion.quantize import convert
from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.fuse import main
from mlxvr.model.loading import load_model

KEYS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def write_adapter(folder: Path, model: Path, *, kind: str = "lora", rank: int = 4, seed: int = 0) -> Path:
    """Random LoRA or DoRA weights for some projections of every layer, written by mlx-vlm's own layers."""
    from mlx.utils import tree_flatten
    from mlx_vlm.trainer.peft import utils as peft

    network = load_model(model).network
    layers = range(len(network.language_model.model.layers))
    keys = [f"language_model.model.layers.{index}.{key}" for index in layers for key in KEYS]
    config = {"fine_tune_type": kind, "lora_parameters": {"rank": rank, "scale": 2.0, "dropout": 0.0, "keys": keys}}
    peft._apply_lora_layers(network, config)
    random = mx.random.key(seed)
    weights = {}
    for name, array in tree_flatten(network.parameters()):
        if name.endswith((".lora_a", ".lora_b")):
            random, key = mx.random.split(random)
            weights[name] = 0.1 * mx.random.normal(array.shape, key=key)
        elif name.endswith(".m"):
            random, key = mx.random.split(random)
            weights[name] = array * (1 + 0.1 * mx.random.uniform(shape=array.shape, key=key))
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def logits_of(folder: Path, adapter: Path | None = None) -> np.ndarray:
    model = load_model(folder, adapter=adapter)
    ids = mx.array([[5, 9, 2, 77, 31, 8, 8, 120]])
    positions = mx.broadcast_to(mx.arange(8), (3, 1, 8))
    return np.array(model.logits(model.hidden(ids, positions)).astype(mx.float32))


def tensors_of(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= mx.load(str(file))
    return found


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(params=FAMILIES)
def source(request, tmp_path):
    return write_checkpoint(tmp_path / "source", request.param)


@pytest.fixture
def plain(source, tmp_path):
    return write_plain(tmp_path, json.loads((source / "config.json").read_text())["model_type"])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_unquantized_weights(kind, source, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxvr.conversion.stream._CHUNK_BYTES", 5000)  # rows in many pieces
    convert(source, tmp_path / "model", bits=0, dtype="float32")
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "model", kind=kind)
    report = fuse(tmp_path / "model", adapter, tmp_path / "out")
    assert (report.bits, report.quantized, report.dtype) == (0, 0, "float32")
    adapted = logits_of(tmp_path / "model", adapter)
    assert error(logits_of(tmp_path / "model"), adapted) > 0.05  # the adapter does something
    assert error(logits_of(tmp_path / "out"), adapted) < 1e-5


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_quantized_weights_that_are_left_unpacked(kind, source, plain, tmp_path):
    convert(source, tmp_path / "model", recipe=plain, bits=4, dtype="float32")
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "model", kind=kind)
    fuse(tmp_path / "model", adapter, tmp_path / "out", dequantize=True)
    assert not [name for name in tensors_of(tmp_path / "out") if name.endswith(".scales")]
    assert error(logits_of(tmp_path / "out"), logits_of(tmp_path / "model", adapter)) < 1e-5


@pytest.mark.parametrize(("mode", "bits"), [("affine", 8), ("affine", 4), ("mxfp4", 4)])
def test_quantized_weights_are_what_mlx_vlms_own_layers_fuse_to(mode, bits, source, plain, tmp_path):
    convert(source, tmp_path / "model", recipe=plain, mode=mode, bits=bits, dtype="float32")
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "model")
    report = fuse(tmp_path / "model", adapter, tmp_path / "out")
    assert (report.bits, report.mode) == (bits, mode)
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not mx.array_equal(before[name], after[name]).item()}
    assert {name.rpartition(".")[0] for name in changed} == {
        name.rpartition(".")[0] for name in mx.load(str(adapter / "adapters.safetensors"))
    }
    adapted = load_model(tmp_path / "model", adapter=adapter)
    for layer in range(len(adapted.layers)):
        for key in KEYS:
            name = f"language_model.model.layers.{layer}.{key}"
            module = adapted.layers[layer]
            for part in key.split("."):
                module = module[part]
            theirs = module.fuse()
            how = {"group_size": theirs.group_size, "bits": bits, "mode": mode}
            ours = mx.dequantize(after[f"{name}.weight"], after[f"{name}.scales"], after.get(f"{name}.biases"), **how)
            expected = mx.dequantize(theirs.weight, theirs.scales, theirs.get("biases"), **how)
            # The order of additions may move a number over the edge between two levels, no more; and mlx-vlm adds to
            # what it unpacked from a float format in bfloat16.
            differing = np.array(mx.abs(ours - expected) > 1e-5 * mx.abs(expected).max())
            assert differing.mean() < (0.001 if mode == "affine" else 0.01), name
    if bits == 8:
        assert error(logits_of(tmp_path / "out"), logits_of(tmp_path / "model", adapter)) < 0.02


def test_the_folder_has_the_form_of_a_converted_one(source, tmp_path):
    convert(source, tmp_path / "model", bits=4)
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "model")
    fuse(tmp_path / "model", adapter, tmp_path / "out")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "out")]
    assert configs[0] == configs[1]
    settings = json.loads((tmp_path / "out" / "mlxvr.json").read_text())
    assert settings["adapter"]["name"] == "adapter"
    assert settings["quantization"] == json.loads((tmp_path / "model" / "mlxvr.json").read_text())["quantization"]
    assert "`adapter`" in (tmp_path / "out" / "README.md").read_text()


def test_rules_of_single_modules_are_kept(tmp_path):
    source = write_checkpoint(tmp_path / "source", "qwen3_vl")
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'family = "qwen3_vl"\nthreshold = 0.9\n[quantization]\nkeep = ["vision_tower.*", "*.k_proj"]\n'
        '[[quantization.rules]]\nmatch = "*.down_proj"\n'
    )
    convert(source, tmp_path / "model", recipe=mine)
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "model")
    fuse(tmp_path / "model", adapter, tmp_path / "out")
    network = load_model(tmp_path / "out").network
    layer = network.language_model.model.layers[0]
    assert (layer.mlp.down_proj.bits, layer.mlp.up_proj.bits) == (8, 4)
    assert not hasattr(layer.self_attn.k_proj, "bits")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    convert(write_checkpoint(tmp_path / "a", "qwen3_vl"), tmp_path / "model")
    wide = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}
    convert(write_checkpoint(tmp_path / "b", "qwen3_vl", text=wide), tmp_path / "other")
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "other")
    with pytest.raises(CheckpointError, match="it was made for another model"):
        fuse(tmp_path / "model", adapter, tmp_path / "out")
    weights = mx.load(str(adapter / "adapters.safetensors"))
    gone = next(name for name in weights if name.endswith(".lora_b"))
    mx.save_safetensors(
        str(adapter / "adapters.safetensors"), {name: array for name, array in weights.items() if name != gone}
    )
    with pytest.raises(CheckpointError, match="lacks a part of"):
        fuse(tmp_path / "other", adapter, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has no adapters\.safetensors"):
        fuse(tmp_path / "other", tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="no option 'forced': did you mean 'force'"):
        fuse(tmp_path / "model", adapter, tmp_path / "out", forced=True)
    with pytest.raises(ConfigError, match="not empty"):
        fuse(tmp_path / "other", write_adapter(tmp_path / "fine", tmp_path / "other"), tmp_path / "model")
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path, capsys):
    convert(write_checkpoint(tmp_path / "source", "qwen3_vl"), tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--adapter", str(adapter), "--mlx-path", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "bits per weight" in capsys.readouterr().out
    assert main([*arguments, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits"] == 4
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
