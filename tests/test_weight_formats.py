"""Sources that are not plain floats: blocks of 8-bit floats, and weights that MLX has quantized."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import FAMILIES, write_checkpoint
from mlx.utils import tree_flatten
from recipes import write_plain

from mlxvr.checkpoint import recipe
from mlxvr.checkpoint.fp8 import unpack_fp8
from mlxvr.conversion.quantize import convert
from mlxvr.errors import CheckpointError, ConfigError, RecipeError
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel

MODES = [("affine", 4, 64), ("affine", 5, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]


def tensors_of(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= mx.load(str(file))
    return found


def same_weights(a: VideoModel, b: VideoModel) -> bool:
    pairs = zip(tree_flatten(a.network.parameters()), tree_flatten(b.network.parameters()), strict=True)
    return all(mx.array_equal(one, other).item() and name == same for (name, one), (same, other) in pairs)


# --- MLX's formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_is_what_mlx_makes_and_loads(family, mode, bits, group_size, tmp_path):
    source = write_checkpoint(tmp_path / "source", family, dtype="BF16")
    fixed = {} if mode != "affine" else {"bits": bits, "group_size": group_size}
    report = convert(source, tmp_path / "out", recipe=write_plain(tmp_path, family), mode=mode, **fixed)
    assert (report.mode, report.bits, report.group_size) == (mode, bits, group_size)
    convert(source, tmp_path / "floats", bits=0)
    floats, found = tensors_of(tmp_path / "floats"), tensors_of(tmp_path / "out")
    quantized = [name for name, array in found.items() if array.dtype == mx.uint32]
    assert len(quantized) == report.quantized > 10
    for name in quantized:
        expected = mx.quantize(floats[name], group_size=group_size, bits=bits, mode=mode)
        module = name.removesuffix(".weight")
        parts = [found[name], found[f"{module}.scales"], *([found[f"{module}.biases"]] if mode == "affine" else [])]
        assert len(parts) == len(expected)
        assert all(mx.array_equal(a, b).item() and a.dtype == b.dtype for a, b in zip(parts, expected, strict=True))
    network = load_model(tmp_path / "out").network
    layer = network.language_model.model.layers[0].mlp.up_proj
    assert (layer.mode, layer.bits, layer.group_size) == (mode, bits, group_size)


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_dequantizing_gives_what_mlx_gives(mode, bits, group_size, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxvr.conversion.stream._CHUNK_BYTES", 2000)  # a few rows at a time
    source = write_checkpoint(tmp_path / "source", "qwen3_vl", dtype="BF16")
    fixed = {} if mode != "affine" else {"bits": bits, "group_size": group_size}
    convert(source, tmp_path / "packed", recipe=write_plain(tmp_path), mode=mode, **fixed)
    report = convert(tmp_path / "packed", tmp_path / "out", dequantize=True)
    packed, found = tensors_of(tmp_path / "packed"), tensors_of(tmp_path / "out")
    assert report.bits == report.quantized == 0
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(found) == {name for name in packed if not name.endswith((".scales", ".biases"))}
    for name, array in found.items():
        module = name.removesuffix(".weight")
        expected = packed[name]
        if f"{module}.scales" in packed:
            scales, biases = packed[f"{module}.scales"], packed.get(f"{module}.biases")
            expected = mx.dequantize(expected, scales, biases, group_size=group_size, bits=bits, mode=mode)
        assert mx.array_equal(array, expected.astype(mx.bfloat16)).item(), name


def test_a_dequantized_model_answers_like_the_packed_one(tmp_path):
    source = write_checkpoint(tmp_path / "source", "qwen2_5_vl")
    convert(source, tmp_path / "packed", bits=4, dtype="float32")
    convert(tmp_path / "packed", tmp_path / "out", dequantize=True, dtype="float32")
    ids = mx.array([[5, 9, 2, 77, 31]])
    positions = mx.broadcast_to(mx.arange(5), (3, 1, 5))
    logits = []
    for folder in ("packed", "out"):
        model = load_model(tmp_path / folder)
        logits.append(np.array(model.logits(model.hidden(ids, positions))))
    assert np.abs(logits[0] - logits[1]).max() < 1e-5 * np.abs(logits[0]).max()


def test_dequantizing_what_is_not_quantized_copies_it(tmp_path):
    source = write_checkpoint(tmp_path / "source", "qwen3_vl", dtype="BF16")
    convert(source, tmp_path / "plain", bits=0)
    convert(source, tmp_path / "out", dequantize=True)
    plain, found = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert all(mx.array_equal(plain[name], array).item() for name, array in found.items())


@pytest.mark.parametrize("options", [{"bits": 4}, {"group_size": 32}, {"mode": "mxfp4"}])
def test_dequantizing_and_quantizing_contradict_each_other(options, tmp_path):
    with pytest.raises(ConfigError, match="leave out the --q options"):
        convert(tmp_path, tmp_path / "out", dequantize=True, **options)


# --- blocks of 8-bit floats -----------------------------------------------------------------------------


def test_the_bytes_of_e4m3_by_hand():
    by_hand = {0x00: 0.0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1.0, 0x3C: 1.5, 0x40: 2.0, 0x7E: 448.0}
    codes = mx.array([[code, code | 0x80] for code in by_hand], dtype=mx.uint8)
    scales = mx.array([[1.0], [0.5], [2.0]])  # for rows 0-2, 3-5, 6-7
    found = np.array(unpack_fp8(codes, scales, (3, 2)))
    factors = [1.0] * 3 + [0.5] * 3 + [2.0] * 2
    assert found.tolist() == [[value * f, -value * f] for value, f in zip(by_hand.values(), factors, strict=True)]


def write_fp8(folder: Path, family: str, block: tuple[int, int], *, scale_dtype: str = "float32") -> dict[str, object]:
    """Turn a checkpoint's language matrices into blocks of 8-bit floats with torch; returns what they stand for."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    write_checkpoint(folder, family, names="new", text={"hidden_size": 64, "intermediate_size": 96})
    tensors = load_file(folder / "model.safetensors")
    meant = {}
    for name, weight in list(tensors.items()):
        if ".layers." not in name or "visual" in name or weight.ndim != 2:
            tensors[name] = weight.to(torch.bfloat16)
            continue
        rows, columns = weight.shape
        scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
        packed = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        restored = torch.empty(rows, columns)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
                scales[i, j] = (weight[part].abs().max() / 448).to(getattr(torch, scale_dtype))
                packed[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
                restored[part] = packed[part].float() * scales[i, j]
        tensors[name] = packed
        tensors[f"{name}_scale_inv"] = scales.to(getattr(torch, scale_dtype))
        meant[name] = restored.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize(
    ("block", "scale_dtype"), [((16, 32), "float32"), ((24, 40), "bfloat16"), ((128, 128), "float32")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_blocks_are_what_torch_reads(family, block, scale_dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("mlxvr.conversion.stream._CHUNK_BYTES", 4000)
    meant = write_fp8(tmp_path / "source", family, block, scale_dtype=scale_dtype)
    assert len(meant) == 3 * 7
    convert(tmp_path / "source", tmp_path / "out", bits=0)
    found = tensors_of(tmp_path / "out")
    for name, expected in meant.items():
        ours = found[name.replace("model.language_model.", "language_model.model.")]
        assert ours.dtype == mx.bfloat16
        assert np.array_equal(np.array(ours.astype(mx.float32)), expected.float().numpy()), name
    assert not [name for name in found if "scale_inv" in name]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    convert(tmp_path / "source", tmp_path / "four", bits=4, group_size=32)
    load_model(tmp_path / "four")
    assert same_weights(load_model(tmp_path / "source"), load_model(tmp_path / "out"))  # and it runs as it is


def test_fp8_sources_that_do_not_add_up_are_refused(tmp_path):
    pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "source"
    write_fp8(folder, "qwen3_vl", (16, 32))
    config = json.loads((folder / "config.json").read_text())
    for change, says in [
        ({"weight_block_size": None}, "no weight_block_size"),
        ({"weight_block_size": [16, 16]}, "_scale_inv has the shape"),
        ({"quant_method": "awq"}, r"quantized already \(awq\).*get the release in bf16"),
    ]:
        changed = {**config, "quantization_config": {**config["quantization_config"], **change}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=says):
            convert(folder, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("_scale_inv"))
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks .*_scale_inv, without which"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- names ----------------------------------------------------------------------------------------------


def test_key_rules_read_names_of_their_own(tmp_path):

    source = write_checkpoint(tmp_path / "source", "qwen3_vl", dtype="BF16")
    convert(source, tmp_path / "plain", recipe=write_plain(tmp_path))
    header = (source / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    entries = json.loads(header[8 : 8 + length])
    wrapped = {name if name == "__metadata__" else f"base_model.model.{name}": entry for name, entry in entries.items()}
    text = json.dumps(wrapped).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + header[8 + length :])
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        convert(source, tmp_path / "out")
    mine = tmp_path / "mine.toml"
    mine.write_text('family = "qwen3_vl"\nthreshold = 0.9\n[[key_rules]]\nprefix = "base_model.model."\n')
    convert(source, tmp_path / "out", recipe=mine)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    mine.write_text('family = "qwen3_vl"\nthreshold = 0.9\n[[key_rules]]\nbecomes = "x"\n')
    with pytest.raises(RecipeError, match=r"'key_rules.prefix' is missing"):
        recipe.load(mine)
