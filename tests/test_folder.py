"""Folders that are whole, and every way in which one can be broken: one clear line before anything is loaded."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest

from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.checkpoint.safetensors import read_header
from mlxvr.errors import CheckpointError


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return checkpoints.write_checkpoint(tmp_path / "model", "qwen3_vl")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return checkpoints.write_checkpoint(tmp_path / "model", "qwen3_vl", shards=3)


def refused(folder: Path, words: str) -> str:
    with pytest.raises(CheckpointError, match=words) as raised:
        ModelFolder.open(folder).check_shapes()
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("names", ["new", "old"])
def test_a_whole_folder(tmp_path: Path, family: str, shards: int, names: str) -> None:
    path = checkpoints.write_checkpoint(tmp_path / "m", family, shards=shards, names=names, dtype="BF16")
    folder = ModelFolder.open(path)
    folder.check_shapes()
    assert folder.family.name == family
    assert folder.settings == {}
    assert folder.chat_template == checkpoints.CHAT_TEMPLATE
    assert folder.image_processor is not None
    assert folder.video_processor is not None
    assert {info.dtype for info in folder.tensors.values()} == {"BF16"}
    assert len({info.file for info in folder.tensors.values()}) == shards


def test_offsets_point_at_the_bytes(whole: Path) -> None:
    folder = ModelFolder.open(whole)
    expected = checkpoints.random_tensors(
        "qwen3_vl", checkpoints.text_settings("qwen3_vl"), checkpoints.vision_settings("qwen3_vl")
    )
    for name in ("model.language_model.norm.weight", "model.visual.patch_embed.proj.weight", "lm_head.weight"):
        info = folder.tensors[name]
        with info.file.open("rb") as file:
            file.seek(info.offsets[0])
            data = np.frombuffer(file.read(info.offsets[1] - info.offsets[0]), dtype="<f4").reshape(info.shape)
        np.testing.assert_array_equal(data, expected[name])


def test_header_agrees_with_the_safetensors_library(whole: Path) -> None:
    from safetensors import safe_open

    found = read_header(whole / "model.safetensors")
    with safe_open(whole / "model.safetensors", framework="numpy") as file:
        assert set(file.keys()) == found.keys()
        assert all(tuple(file.get_slice(name).get_shape()) == info.shape for name, info in found.items())


def test_not_a_model_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "has no config.json")
    file = tmp_path / "file"
    file.write_text("x")
    refused(file, "is a file")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_damaged_config(whole: Path, content: str) -> None:
    (whole / "config.json").write_text(content)
    refused(whole, r"config\.json")


def test_unsupported_architecture(whole: Path) -> None:
    (whole / "config.json").write_text(json.dumps({"model_type": "llava"}))
    assert "qwen2_5_vl and qwen3_vl" in refused(whole, "'llava'")


def test_quantization_of_other_libraries_is_refused(whole: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    foreign = {"quant_method": "awq", "bits": 4}
    (whole / "config.json").write_text(json.dumps({**config, "quantization_config": foreign}))
    refused(whole, r"quantized already \(awq\)")
    # mlx-vlm writes its own settings under both names
    ours = {"bits": 4, "group_size": 64}
    (whole / "config.json").write_text(json.dumps({**config, "quantization": ours, "quantization_config": ours}))
    ModelFolder.open(whole).check_shapes()


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "lacks the shard model-00002-of-00003.safetensors: its download is not complete")


def test_shard_of_another_download(sharded: Path) -> None:
    (sharded / "model-00004-of-00004.safetensors").write_bytes(b"")
    refused(sharded, "model-00004-of-00004.safetensors, which its index does not know")


def test_index_that_promises_more_than_a_shard_holds(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["extra.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    refused(sharded, r"does not hold extra\.weight")


def test_index_without_a_map(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{}")
    refused(sharded, "no usable weight_map")


def test_two_files_with_the_same_tensor(whole: Path) -> None:
    (whole / "model-copy.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    refused(whole, "both model-copy.safetensors and model.safetensors hold")


def test_adapters_beside_the_model_are_not_its_weights(whole: Path) -> None:
    before = set(ModelFolder.open(whole).tensors)
    (whole / "adapters.safetensors").write_bytes(b"not read")
    folder = ModelFolder.open(whole)
    folder.check_shapes()  # raises nothing
    assert set(folder.tensors) == before


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_truncated_safetensors(whole: Path, keep: int) -> None:
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(whole, r"model\.safetensors is cut short")


def _first_entry(header: dict) -> dict:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def _break_dtype(header: dict) -> None:
    _first_entry(header)["dtype"] = "F6"


def _break_shape(header: dict) -> None:
    _first_entry(header)["shape"] = [3, 5]


def _break_entry(header: dict) -> None:
    _first_entry(header).pop("shape")


def _break_offsets(header: dict) -> None:
    _first_entry(header)["data_offsets"] = [-4, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_break_dtype, "dtype 'F6'"),
        (_break_shape, r"is F32 \[3, 5\] but takes"),
        (_break_entry, "in a way that cannot be read"),
        (_break_offsets, "in a way that cannot be read"),
    ],
)
def test_damaged_header(whole: Path, change: Callable[[dict], None], words: str) -> None:
    path = whole / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])
    refused(whole, words)


def test_files_that_are_no_safetensors(whole: Path) -> None:
    path = whole / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good + b"more")
    refused(whole, "4 bytes more than its header describes")
    path.write_bytes(b"<html>" * 1000)  # what a failed download often is
    refused(whole, "does not begin like a safetensors file")
    path.write_bytes(struct.pack("<Q", 8) + b"notjson!")
    refused(whole, "header is not JSON")
    path.write_bytes(struct.pack("<Q", 2) + b"[]")
    refused(whole, "not a JSON object")


def test_no_weights(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    refused(whole, r"has no \.safetensors file")


def test_pickles_are_refused(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    (whole / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04.")
    assert "can run code" in refused(whole, r"pickle only \(pytorch_model-00001-of-00002\.bin\)")


def test_missing_tokenizer(whole: Path) -> None:
    (whole / "tokenizer.json").unlink()
    refused(whole, r"has no tokenizer\.json")


def test_missing_tensor(tmp_path: Path) -> None:
    gone = "model.visual.blocks.2.attn.qkv.bias"
    path = checkpoints.write_checkpoint(tmp_path / "m", weights=lambda name, array: None if name == gone else array)
    refused(path, r"lacks the tensor vision_tower\.blocks\.2\.attn\.qkv\.bias \[192\]")


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    odd = "model.language_model.layers.1.mlp.down_proj.weight"
    path = checkpoints.write_checkpoint(
        tmp_path / "m", weights=lambda name, array: array.T.copy() if name == odd else array
    )
    message = refused(path, r"layers\.1\.mlp\.down_proj\.weight has the shape \[128, 64\], expected \[64, 128\]")
    assert "model.safetensors" in message


def test_unknown_tensors_are_only_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = checkpoints.write_checkpoint(tmp_path / "m")
    tensors = checkpoints.random_tensors(
        "qwen3_vl", checkpoints.text_settings("qwen3_vl"), checkpoints.vision_settings("qwen3_vl")
    )
    checkpoints.write_weights(path, {**tensors, "model.other.weight": np.zeros((2, 2), np.float32)})
    ModelFolder.open(path).check_shapes()
    assert "model.other.weight" in caplog.text


def test_quantized_shapes(tmp_path: Path) -> None:
    path = checkpoints.write_checkpoint(tmp_path / "m")
    name = "model.language_model.layers.0.mlp.up_proj"
    shapes = {f"{name}.weight": (128, 8), f"{name}.scales": (128, 2), f"{name}.biases": (128, 2)}
    _quantize_by_hand(path, name, shapes)
    refused(path, "does not say how language_model.model.layers.0.mlp.up_proj is quantized")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization": {"bits": 4, "group_size": 32}}))
    ModelFolder.open(path).check_shapes()
    _quantize_by_hand(path, name, {**shapes, f"{name}.scales": (128, 1)})
    refused(path, r"up_proj\.scales has the shape \[128, 1\], expected \[128, 2\]")
    del shapes[f"{name}.biases"]
    _quantize_by_hand(path, name, shapes)
    refused(path, r"lacks .*up_proj\.biases, without which")


def test_precision_of_a_single_module(whole: Path) -> None:
    own = {"language_model.lm_head": {"bits": 8, "group_size": 32}, "bits": 4, "group_size": 64}
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "quantization": own}))
    folder = ModelFolder.open(whole)
    assert folder.quantization_of("language_model.lm_head") == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert folder.quantization_of("other") == {"bits": 4, "group_size": 64, "mode": "affine"}


def _quantize_by_hand(path: Path, module: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write the checkpoint with one module packed; the numbers do not matter."""
    from safetensors.numpy import save_file

    tensors = checkpoints.random_tensors(
        "qwen3_vl", checkpoints.text_settings("qwen3_vl"), checkpoints.vision_settings("qwen3_vl")
    )
    del tensors[f"{module}.weight"]
    for name, shape in shapes.items():
        dtype = np.uint32 if name.endswith(".weight") else np.float32
        tensors[name] = np.zeros(shape, dtype)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("where", ["chat_template.json", "tokenizer_config.json", "list"])
def test_chat_template_in_its_older_places(whole: Path, where: str) -> None:
    (whole / "chat_template.jinja").unlink()
    assert ModelFolder.open(whole).chat_template is None
    file = "chat_template.json" if where == "chat_template.json" else "tokenizer_config.json"
    template: object = "{{ messages }}"
    if where == "list":
        template = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages }}"}]
    (whole / file).write_text(json.dumps({"chat_template": template}))
    assert ModelFolder.open(whole).chat_template == "{{ messages }}"


def test_transformers_5_may_nest_both_processors(whole: Path) -> None:
    (whole / "preprocessor_config.json").unlink()
    (whole / "video_preprocessor_config.json").unlink()
    assert ModelFolder.open(whole).video_processor is None
    (whole / "processor_config.json").write_text('{"video_processor": {"fps": 3}}')
    assert ModelFolder.open(whole).video_processor == {"video_processor": {"fps": 3}}


def test_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    first = checkpoints.write_checkpoint(tmp_path / "a", seed=1)
    again = checkpoints.write_checkpoint(tmp_path / "b", seed=1)
    other = checkpoints.write_checkpoint(tmp_path / "c", seed=2)
    prints = [ModelFolder.open(path).fingerprint() for path in (first, again, other)]
    assert prints[0] == prints[1] != prints[2]
    config = json.loads((again / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (again / "config.json").write_text(json.dumps(config))
    assert ModelFolder.open(again).fingerprint() != prints[0]


def test_the_fingerprint_reads_every_byte(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "a", seed=1)
    before = ModelFolder.open(folder)
    samples, fingerprint = before.sample(), before.fingerprint()
    after = ModelFolder.open(checkpoints.change_small_module(folder))
    assert after.sample() == samples  # what told checkpoints apart before
    assert after.fingerprint() != fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "preprocessor_config.json"])
def test_the_fingerprint_covers_what_else_answers_depend_on(whole: Path, name: str) -> None:
    before = ModelFolder.open(whole).fingerprint()
    text = (whole / name).read_text(encoding="utf-8")
    (whole / name).write_text(text.replace('"', ' "', 1) if name == "tokenizer.json" else text.replace("2", "3", 1))
    if name == "chat_template.jinja":
        (whole / name).write_text(text + "\n")
    assert ModelFolder.open(whole).fingerprint() != before


def test_weights_that_change_after_loading_have_no_fingerprint(whole: Path) -> None:
    folder = ModelFolder.open(whole)
    find = folder.identify_later()
    assert find() == folder.fingerprint()
    later = folder.identify_later()
    checkpoints.change_small_module(whole)
    with pytest.raises(CheckpointError, match="has changed since the model was loaded"):
        later()
    (whole / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has changed since the model was loaded"):
        later()


def test_opening_a_folder_needs_no_mlx(whole: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from mlxvr.checkpoint.folder import ModelFolder\n"
        f"ModelFolder.open({str(whole)!r})\n"
        "heavy = {'mlx', 'mlx_vlm', 'torch', 'transformers'} & {name.split('.')[0] for name in sys.modules}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
