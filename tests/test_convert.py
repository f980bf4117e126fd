"""The converter: what it writes is what MLX's own `quantize` gives, loads elsewhere, and is whole or not there."""

import json
import math
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import FAMILIES, write_checkpoint
from hub_server import COMMIT, Repo, serve
from recipes import write_plain

import mlxvr
from mlxvr import convert as verb
from mlxvr.answering.loop import AskRequest
from mlxvr.checkpoint import hub
from mlxvr.conversion import shards
from mlxvr.conversion import source as checkpoint
from mlxvr.convert import convert, main
from mlxvr.errors import CheckpointError, ConfigError, MlxvrError, RecipeError
from mlxvr.model.loading import load_model
from mlxvr.model.prompt import SYSTEM_PROMPT
from mlxvr.storage import staging

# What MLX calls a tensor of a checkpoint in transformers' current spelling; written down from the public checkpoints.
SPELLINGS = (
    ("model.language_model.", "language_model.model."),
    ("model.visual.", "vision_tower."),
    ("lm_head.", "language_model.lm_head."),
)
PATCH_EMBEDDING = "vision_tower.patch_embed.proj.weight"


def source_tensors(folder: Path) -> dict[str, mx.array]:
    """The source's tensors under MLX's names and in its layout, read by MLX."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, array in mx.load(str(file)).items():
            old, new = next((old, new) for old, new in SPELLINGS if name.startswith(old))
            tensors[new + name.removeprefix(old)] = array
    tensors[PATCH_EMBEDDING] = tensors[PATCH_EMBEDDING].transpose(0, 2, 3, 4, 1)
    return tensors


def output_tensors(folder: Path) -> dict[str, mx.array]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= mx.load(str(folder / file))
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]
    return tensors


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b, equal_nan=True).item()


def is_language_matrix(name: str, array: mx.array) -> bool:
    return name.startswith("language_model.") and array.ndim == 2


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source", "qwen3_vl", dtype="BF16")


@pytest.fixture
def left_behind(tmp_path):
    """What a failed conversion left in the folder that holds source and target, hidden files included."""
    return lambda: sorted(path.name for path in tmp_path.iterdir() if path.name != "source")


# --- the weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_what_mlx_quantizes_it_to(family, bits, tmp_path):
    folder = write_checkpoint(tmp_path / "source", family, dtype="BF16", shards=3)
    report = convert(folder, tmp_path / "out", recipe=write_plain(tmp_path, family), bits=bits, group_size=32)
    found, quantized = output_tensors(tmp_path / "out"), 0
    for name, weight in source_tensors(folder).items():
        if not is_language_matrix(name, weight):
            assert same(found.pop(name), weight), name
            continue
        module, quantized = name.removesuffix(".weight"), quantized + 1
        parts = [found.pop(key) for key in (name, f"{module}.scales", f"{module}.biases")]
        assert all(same(ours, theirs) for ours, theirs in zip(parts, mx.quantize(weight, 32, bits), strict=True)), name
        # And by arithmetic: a weight is off by a step of its group's range at most, plus what rounding the scale
        # and bias to bfloat16 (8 significant bits) does to numbers of the group's size.
        wide = [parts[0], *(part.astype(mx.float32) for part in parts[1:])]
        restored = np.array(mx.dequantize(*wide, group_size=32, bits=bits)).reshape(-1, 32)
        groups = np.array(weight.astype(mx.float32)).reshape(-1, 32)
        step = (np.maximum(groups.max(1), 0) - np.minimum(groups.min(1), 0)) / (2**bits - 1)
        allowed = step + np.abs(groups).max(1) / 2**7
        assert (np.abs(groups - restored).max(1) <= allowed).all(), name
    assert not found
    assert report.quantized == quantized
    assert report.indivisible == ()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_without_quantization_only_the_dtype_changes(dtype, tmp_path):
    folder = write_checkpoint(tmp_path / "source", "qwen2_5_vl", dtype="F32")
    report = convert(folder, tmp_path / "out", bits=0, dtype=dtype)
    found = output_tensors(tmp_path / "out")
    expected = {name: array.astype(getattr(mx, dtype)) for name, array in source_tensors(folder).items()}
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)
    config = read_json(tmp_path / "out" / "config.json")
    assert "quantization" not in config
    assert config["torch_dtype"] == dtype
    assert report.bits_per_weight == {"float32": 32, "float16": 16, "bfloat16": 16}[dtype]


@pytest.mark.parametrize(
    ("family", "dialect", "names"),
    [
        *((family, dialect, names) for family in FAMILIES for dialect in ("5", "4.57") for names in ("new", "old")),
        ("qwen2_5_vl", "first", "old"),
    ],
)
def test_every_dialect_and_spelling_gives_the_same_bytes(family, dialect, names, tmp_path):
    reference = write_checkpoint(tmp_path / "reference", family, dtype="BF16")
    convert(reference, tmp_path / "expected")
    folder = write_checkpoint(tmp_path / "source", family, dialect=dialect, names=names, dtype="BF16", shards=2)
    convert(folder, tmp_path / "out")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_is_mlx_already_gives_the_same_bytes(family, tmp_path):
    folder = write_checkpoint(tmp_path / "source", family, dtype="BF16")
    convert(folder, tmp_path / "direct", bits=4)
    convert(folder, tmp_path / "mlx", bits=0)
    convert(tmp_path / "mlx", tmp_path / "twice", bits=4)
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (
        tmp_path / "direct" / "model.safetensors"
    ).read_bytes()
    assert read_json(tmp_path / "twice" / "mlxvr.json")["source"] == "source"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights_as_mlx_vlms_own_converter_and_its_output_as_a_source(family, tmp_path):
    from mlx_vlm.convert import convert as stock_convert

    names = {"qwen2_5_vl": "old", "qwen3_vl": "new"}[family]  # the only spelling of each that mlx-vlm knows
    folder = write_checkpoint(tmp_path / "source", family, dialect="4.57", names=names, dtype="BF16")
    plain = write_plain(tmp_path, family)
    convert(folder, tmp_path / "out", recipe=plain, bits=4, group_size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_convert(str(folder), str(tmp_path / "stock"), quantize=True, q_bits=4, q_group_size=64)
        stock_convert(str(folder), str(tmp_path / "float"))
    ours, theirs = output_tensors(tmp_path / "out"), output_tensors(tmp_path / "stock")
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)
    convert(tmp_path / "float", tmp_path / "again", recipe=plain, bits=4, group_size=64)
    again = output_tensors(tmp_path / "again")
    assert all(same(ours[name], again[name]) for name in ours)


def test_rows_that_groups_do_not_divide_stay_as_they_are(source, tmp_path):
    report = convert(source, tmp_path / "out", group_size=128)
    found = output_tensors(tmp_path / "out")
    # Rows of 64 (the hidden size) cannot be divided by 128; the MLP's down projection and o_proj have rows of 128.
    assert report.quantized == 2 * 3
    assert "language_model.lm_head" in report.indivisible
    assert found["language_model.lm_head.weight"].dtype == mx.bfloat16
    assert found["language_model.model.layers.0.mlp.down_proj.weight"].dtype == mx.uint32


def test_bits_per_weight_by_hand(tmp_path):
    text = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
    folder = write_checkpoint(tmp_path / "source", "qwen3_vl", dtype="BF16", tied=True, text=text)
    report = convert(folder, tmp_path / "out", recipe=write_plain(tmp_path), bits=4, group_size=64)
    # embeddings 512x64; q 128x64, k and v 64x64, o 64x128; gate and up 128x64, down 64x128
    matrices = 512 * 64 + 128 * 64 + 2 * 64 * 64 + 64 * 128 + 3 * 64 * 128
    every = sum(math.prod(array.shape) for array in source_tensors(folder).values())
    # 4 bits for a weight; 16 + 16 for the scale and bias that 64 of them share
    expected = (matrices * (4 + 32 / 64) + (every - matrices) * 16) / every
    assert report.parameters == every
    assert report.bits_per_weight == pytest.approx(expected, abs=1e-9)
    assert report.bytes_before == 2 * every


def test_tied_embeddings_drop_a_copied_head(tmp_path):
    embedding = []

    def copied(name: str, array: np.ndarray) -> np.ndarray:
        if name.endswith("embed_tokens.weight"):
            embedding.append(array)
        return embedding[0] if name == "lm_head.weight" else array

    folder = write_checkpoint(tmp_path / "source", "qwen3_vl", dtype="BF16", weights=copied)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    convert(folder, tmp_path / "out")
    assert len(embedding) == 1, "the source has a head of its own"
    assert not any("lm_head" in name for name in output_tensors(tmp_path / "out"))
    quantization = read_json(tmp_path / "out" / "config.json")["quantization"]
    assert quantization["bits"] == 4
    assert quantization["language_model.model.embed_tokens"]["bits"] == 8, "the embedding is the head, which has 8"


@pytest.mark.parametrize(
    ("source", "revision", "asked"),
    [
        ("org/name", None, "v1"),
        ("ORG/Name", None, "v1"),  # the Hub does not tell them apart
        ("org/name", "v2", "v2"),
        ("org/other", None, None),
    ],
)
def test_the_revision_that_a_recipe_pins_is_downloaded(tmp_path, monkeypatch, source, revision, asked):
    pinned = tmp_path / "pinned.toml"
    pinned.write_text('source = "org/name"\nrevision = "v1"\nfamily = "qwen3_vl"\nthreshold = 0.9\n')
    seen = []

    def resolve(model, *, revision, progress):
        seen.append((model, revision))
        raise CheckpointError("seen")

    monkeypatch.setattr(hub, "resolve", resolve)
    with pytest.raises(CheckpointError, match="seen"):
        convert(source, tmp_path / "out", recipe=pinned, revision=revision)
    assert seen == [(source, asked)]


def test_large_outputs_are_split_into_shards(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "one")
    monkeypatch.setattr(shards.plan_shards, "__defaults__", (200_000,))
    convert(source, tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = output_tensors(tmp_path / "one"), output_tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(same(one[name], many[name]) for name in one)
    for file in files:  # a matrix and its scales are never parted, and no file holds more than it may
        names = set(mx.load(str(file)))
        assert {name.replace(".scales", ".weight") for name in names if name.endswith(".scales")} <= names
        assert file.stat().st_size < 200_000 + 20_000


def test_chunks_of_rows_change_nothing(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "whole")
    monkeypatch.setattr("mlxvr.conversion.stream._CHUNK_BYTES", 1000)
    convert(source, tmp_path / "chunks")
    for name in ("model.safetensors", "config.json", "mlxvr.json"):
        assert (tmp_path / "chunks" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_memory_does_not_grow_with_the_largest_tensor(tmp_path):
    """An embedding of 256 MB, a hole in a sparse file, passes through in a small part of that."""
    rows = 1_000_000
    folder = write_checkpoint(
        tmp_path / "source", tied=True, weights=lambda name, array: None if "embed_tokens" in name else array
    )
    config = read_json(folder / "config.json")
    config["text_config"]["vocab_size"] = rows
    (folder / "config.json").write_text(json.dumps(config))
    entry = {"dtype": "F32", "shape": [rows, 64], "data_offsets": [0, rows * 64 * 4]}
    header = json.dumps({"model.language_model.embed_tokens.weight": entry}).encode()
    with (folder / "embedding.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 64 * 4)
    code = f"""
import resource
from mlxvr.conversion.quantize import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = convert({str(folder)!r}, {str(tmp_path / "out")!r})
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert report.bytes_before > {rows * 64 * 4}
print((after - before) * (1 if __import__("sys").platform == "darwin" else 1024))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 * 2**20


# --- loading elsewhere ----------------------------------------------------------------------------------


def stock_model(folder: Path) -> nn.Module:
    from mlx_vlm.utils import load_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model(folder)


def logits_of(model: nn.Module) -> mx.array:
    ids = mx.array([[5, 80, 12, 300, 7, 7, 42]])
    return model(ids).logits.astype(mx.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [0, 4])
def test_stock_mlx_vlm_and_ours_load_the_output_and_agree(family, bits, tmp_path):
    folder = write_checkpoint(tmp_path / "source", family, dtype="BF16")
    convert(folder, tmp_path / "out", bits=bits, dtype="float32")
    expected = logits_of(stock_model(tmp_path / "out"))
    assert mx.isfinite(expected).all().item()
    assert expected.std().item() > 0.1
    model = load_model(tmp_path / "out")
    ids = mx.array([[5, 80, 12, 300, 7, 7, 42]])
    positions = mx.broadcast_to(mx.arange(7), (3, 1, 7))
    ours = model.logits(model.hidden(ids, positions)).astype(mx.float32)
    assert mx.abs(ours - expected).max().item() <= 1e-4 * mx.abs(expected).max().item()


def test_stock_mlx_vlm_loads_the_processor_too(source, tmp_path):
    from mlx_vlm.utils import load

    convert(source, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, processor = load(str(tmp_path / "out"))
    ids = processor.tokenizer.encode("a red ball")
    assert processor.tokenizer.decode(ids) == "a red ball"
    assert mx.isfinite(model(mx.array([ids])).logits).all().item()


def test_rules_and_keeps_reach_the_modules_of_the_loaded_network(source, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("""
family = "qwen3_vl"
threshold = 0.9
[quantization]
bits = 3
group_size = 32
keep = ["vision_tower.*", "language_model.model.layers.0.*"]
[[quantization.rules]]
match = "language_model.lm_head"
min_bits = 8
[[quantization.rules]]
match = "*.v_proj"
min_bits = 6
group_size = 64
""")
    report = convert(source, tmp_path / "out", recipe=recipe)
    assert report.recipe == "mine"
    model = stock_model(tmp_path / "out").language_model
    layers = model.model.layers
    assert isinstance(layers[0].mlp.up_proj, nn.Linear)
    how = {
        name: (module.bits, module.group_size)
        for name, module in [
            ("up", layers[1].mlp.up_proj),
            ("value", layers[1].self_attn.v_proj),
            ("head", model.lm_head),
            ("embeddings", model.model.embed_tokens),
        ]
    }
    assert how == {"up": (3, 32), "value": (6, 64), "head": (8, 32), "embeddings": (3, 32)}
    quantization = read_json(tmp_path / "out" / "config.json")["quantization"]
    assert quantization["language_model.lm_head"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert quantization["language_model.model.layers.0.mlp.up_proj"] is False
    assert "language_model.model.layers.1.mlp.up_proj" not in quantization


def test_a_quantized_vision_tower_loads_as_well(source, tmp_path):
    recipe = tmp_path / "all.toml"
    recipe.write_text('family = "qwen3_vl"\nthreshold = 0.9\n[quantization]\nkeep = []\ngroup_size = 32\n')
    convert(source, tmp_path / "out", recipe=recipe)
    tower = stock_model(tmp_path / "out").vision_tower
    assert isinstance(tower.blocks[0].attn.qkv, nn.QuantizedLinear)


# --- what stands beside the weights ---------------------------------------------------------------------


def test_side_files(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: mit\nlicense_link: LICENSE\nlanguage: en\n---\n# x\n")
    (source / "LICENSE").write_text("MIT")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    config = {**read_json(source / "config.json"), "auto_map": {"AutoModel": "modeling_evil.Model"}}
    (source / "config.json").write_text(json.dumps(config))
    report = convert(source, tmp_path / "out")
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    copied |= {"preprocessor_config.json", "video_preprocessor_config.json", "LICENSE"}
    written = {"config.json", "mlxvr.json", "README.md", "model.safetensors", "model.safetensors.index.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == copied | written
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    config = read_json(tmp_path / "out" / "config.json")
    assert config["quantization"] == config["quantization_config"]
    assert {key: config["quantization"][key] for key in ("bits", "group_size", "mode")} == {
        "bits": 4,
        "group_size": 64,
        "mode": "affine",
    }
    raised = {name: entry["bits"] for name, entry in config["quantization"].items() if isinstance(entry, dict)}
    layers = [f"language_model.model.layers.{index}.mlp.down_proj" for index in range(3)]
    assert raised == {"language_model.lm_head": 8, **dict.fromkeys(layers, 6)}  # as the recipe has it
    assert "auto_map" not in config
    settings = read_json(tmp_path / "out" / "mlxvr.json")
    assert settings["source"] == "source"
    assert settings["threshold"] == report.threshold == 0.98
    assert settings["recipe"]["name"] == "qwen3_vl"
    assert settings["quantization"]["bits_per_weight"] == pytest.approx(report.bits_per_weight, abs=1e-3)
    assert settings["versions"]["mlx"] == mx.__version__
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit\nlicense_link: LICENSE\n" in card
    assert "base_model" not in card  # the source is a folder, not a repository
    assert str(tmp_path) not in card + json.dumps(settings)


def test_measured_settings_of_the_source_stand_above_the_recipe(source, tmp_path):
    (source / "mlxvr.json").write_text(
        json.dumps({"threshold": 0.9, "frame_limits": {"max_frames": 7}, "recipe": "shellgame"})
    )
    assert convert(source, tmp_path / "a").recipe == "shellgame"
    settings = read_json(tmp_path / "a" / "mlxvr.json")
    assert (settings["threshold"], settings["frame_limits"]) == (0.9, {"max_frames": 7})
    assert convert(source, tmp_path / "b", recipe="qwen3_vl").threshold == 0.98  # asked for by name


@pytest.mark.parametrize(
    "settings", [{"threshold": 1.5}, {"threshold": "0.9"}, {"threshold": True}, {"frame_limits": [1]}]
)
def test_settings_of_the_source_that_make_no_sense(settings, source, tmp_path, left_behind):
    (source / "mlxvr.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"mlxvr\.json: (threshold|frame_limits) = .*; expected"):
        convert(source, tmp_path / "out")
    assert left_behind() == []


def test_a_system_prompt_of_its_own_travels_and_is_used(source, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('family = "qwen3_vl"\nthreshold = 0.9\nsystem_prompt = "Look twice."\n')
    convert(source, tmp_path / "own", recipe=mine)
    convert(source, tmp_path / "usual")
    assert "system_prompt" not in read_json(tmp_path / "usual" / "mlxvr.json")
    for name, system in [("own", "Look twice."), ("usual", SYSTEM_PROMPT)]:
        with mlxvr.load(tmp_path / name) as reasoner, reasoner.open(np.zeros((64, 64, 3), np.uint8)) as clip:
            prompt = clip._prompt(reasoner._network, AskRequest("What is it?"))
            text = reasoner._network.tokenizer.decode(prompt.ids.tolist())
            assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>")
            assert clip.ask("What is it?", max_tokens=2).usage.prompt_tokens == len(prompt.ids)
    settings = read_json(tmp_path / "own" / "mlxvr.json")
    (tmp_path / "own" / "mlxvr.json").write_text(json.dumps({**settings, "system_prompt": 3}))
    with pytest.raises(CheckpointError, match="system_prompt 3; expected a text"):
        mlxvr.load(tmp_path / "own")


def test_from_the_hub_with_the_recipe_of_that_checkpoint(source, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    stages = set()
    with serve(**{"IVUL-KAUST__VideoAuto-R1-Qwen3-VL-8B": Repo(files, lfs={"model.safetensors"})}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        report = convert(
            "IVUL-KAUST/VideoAuto-R1-Qwen3-VL-8B", "out", progress=lambda stage, *counts: stages.add(stage)
        )
    assert stages == {"download", "check", "convert"}
    assert (report.recipe, report.commit) == ("videoauto-r1-qwen3-vl-8b", COMMIT)
    settings = read_json(tmp_path / "out" / "mlxvr.json")
    assert settings["source"] == "IVUL-KAUST/VideoAuto-R1-Qwen3-VL-8B"
    assert settings["commit"] == COMMIT
    assert settings["threshold"] == 0.98
    assert settings["frame_limits"]["max_frames"] == 256
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: IVUL-KAUST/VideoAuto-R1-Qwen3-VL-8B\n" in card
    assert "license: apache-2.0\n" in card


# --- sources that are refused ---------------------------------------------------------------------------


def spoil(value: float):
    def change(name: str, array: np.ndarray) -> np.ndarray:
        if name.endswith("layers.2.mlp.down_proj.weight"):
            array = array.copy()
            array[-1, -1] = value
        return array

    return change


def without(part: str):
    return lambda name, array: None if part in name else array


def reshaped(part: str):
    return lambda name, array: array[:-1] if part in name else array


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [0, 4])
def test_nan_and_infinity_are_found_as_they_pass(dtype, value, bits, tmp_path, left_behind):
    with np.errstate(all="ignore"):
        folder = write_checkpoint(tmp_path / "source", dtype="F32" if dtype == "BF16" else dtype, weights=spoil(value))
    if dtype == "BF16":  # rounding to bfloat16 by hand does not keep NaN, so let the bits be cut off
        truncate_to_bfloat16(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj\.weight holds NaN or infinity"):
        convert(folder, tmp_path / "out", bits=bits)
    assert left_behind() == []


def truncate_to_bfloat16(path: Path) -> None:
    tensors = mx.load(str(path))
    cut = {name: mx.view(mx.view(array, mx.uint16)[..., 1::2], mx.bfloat16) for name, array in tensors.items()}
    mx.save_safetensors(str(path), cut)


def test_numbers_too_large_for_float16_are_told_apart(tmp_path, left_behind):
    folder = write_checkpoint(tmp_path / "source", dtype="F32", weights=spoil(1e6))
    with pytest.raises(CheckpointError, match="too large for the chosen dtype; convert with dtype bfloat16"):
        convert(folder, tmp_path / "out", dtype="float16")
    assert left_behind() == []
    convert(folder, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_bit_trick_agrees_with_isfinite(dtype):
    if dtype == "F32":
        edges = np.array([0x7F7FFFFF, 0x7F800000, 0x7F800001, 0xFFC00000, 0xFF7FFFFF, 0, 0x80000000], dtype="<u4")
        values = [float(value) for value in edges.view("<f4")]
    else:
        edges = np.arange(2**16, dtype="<u2")  # all there are
        kind = mx.bfloat16 if dtype == "BF16" else mx.float16
        values = np.array(mx.array(edges).view(kind).astype(mx.float32)).tolist()
    for bits, value in zip(edges, values, strict=True):
        assert checkpoint.all_finite(np.array([0, bits], dtype=edges.dtype), dtype) == math.isfinite(value)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (without("layers.1.mlp.up_proj"), r"layers\.1\.mlp\.up_proj\.weight"),
        (without("visual.merger"), "merger"),
        (
            reshaped("layers.1.mlp.up_proj"),
            r"layers\.1\.mlp\.up_proj\.weight has the shape \[127, 64\], expected \[128, 64\]",
        ),
        (reshaped("patch_embed.proj.weight"), r"patch_embed"),
    ],
)
def test_missing_and_misshapen_tensors_are_named_before_anything_is_written(
    weights, says, tmp_path, left_behind, monkeypatch
):
    folder = write_checkpoint(tmp_path / "source", weights=weights)
    monkeypatch.setattr("mlxvr.conversion.quantize.staged", lambda target: pytest.fail("output was begun"))
    with pytest.raises(CheckpointError, match=says):
        convert(folder, tmp_path / "out")
    assert left_behind() == []


def add_tensors(folder: Path, **tensors: mx.array) -> None:
    mx.save_safetensors(str(folder / "more.safetensors"), {name.replace("__", "."): a for name, a in tensors.items()})


def test_extra_and_doubled_tensors_are_named(tmp_path, left_behind):
    folder = write_checkpoint(tmp_path / "source")
    add_tensors(folder, value_head__weight=mx.zeros((1, 64)))
    with pytest.raises(CheckpointError, match=r"holds value_head\.weight, which a qwen3_vl network"):
        convert(folder, tmp_path / "out")
    add_tensors(folder, model__norm__weight=mx.ones(64))  # also there as model.language_model.norm.weight
    with pytest.raises(
        CheckpointError, match=r"twice, as model\.language_model\.norm\.weight and as model\.norm\.weight"
    ):
        convert(folder, tmp_path / "out")
    assert left_behind() == []


def test_buffers_of_old_releases_are_left_out(tmp_path):
    folder = write_checkpoint(tmp_path / "source")
    add_tensors(folder, model__layers__0__self_attn__rotary_emb__inv_freq=mx.zeros(16))
    convert(folder, tmp_path / "out")
    assert not any("inv_freq" in name for name in output_tensors(tmp_path / "out"))


def test_quantized_sources_are_refused_with_the_reason(source, tmp_path):
    convert(source, tmp_path / "four")
    with pytest.raises(CheckpointError, match=r"quantized already \(4-bit\); rounding twice .* convert source"):
        convert(tmp_path / "four", tmp_path / "eight", bits=8)
    config = read_json(source / "config.json")
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match=r"quantized already \(awq\)"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "eight").exists()


def test_other_refusals(source, tmp_path, left_behind):
    for call, kind, says in [
        (lambda: convert(tmp_path / "gone", tmp_path / "out"), CheckpointError, "no such folder"),
        (lambda: convert(source, tmp_path / "out", bit=4), ConfigError, "no option 'bit': did you mean 'bits'"),
        (lambda: convert(source, tmp_path / "out", bits=7), RecipeError, "bits = 7; expected one of"),
        (lambda: convert(source, tmp_path / "out", bits="auto"), ConfigError, "--q-bits auto and --target-gb together"),
        (lambda: convert(source, tmp_path / "out", target_bytes=10**6), ConfigError, "--target-gb together"),
        (
            lambda: convert(source, tmp_path / "out", bits="auto", target_bytes=10**6, mode="mxfp4"),
            ConfigError,
            "leave out --q-group-size and --q-mode",
        ),
        (lambda: convert(source, tmp_path / "out", bits="most"), RecipeError, "expected a number or 'auto'"),
        (lambda: convert(source, tmp_path / "out", mode="fp4"), RecipeError, "mode = 'fp4'"),
        (lambda: convert(source, tmp_path / "out", mode="mxfp4", bits=8), RecipeError, "bits = 8; expected 4"),
        (lambda: convert(source, tmp_path / "out", group_size=0), RecipeError, "group_size = 0"),
        (lambda: convert(source, tmp_path / "out", group_size=48), RecipeError, "group_size = 48"),
        (lambda: convert(source, tmp_path / "out", dtype="int8"), RecipeError, "dtype = 'int8'"),
        (lambda: convert(source, tmp_path / "out", recipe="nope"), RecipeError, "no recipe is called 'nope'"),
        (lambda: convert(source, tmp_path / "out", recipe="qwen2_5_vl"), RecipeError, "is for qwen2_5_vl"),
        (lambda: convert(source, tmp_path / "out", revision="main"), ConfigError, "no revisions"),
        (lambda: convert(source, source), ConfigError, "not empty"),
        (lambda: convert(source, source, force=True), ConfigError, "is or holds the source"),
        (lambda: convert(source, tmp_path, force=True), ConfigError, "no model folder that could be replaced"),
        (
            lambda: convert(source, tmp_path),
            ConfigError,
            "no model folder that could be replaced; choose another folder$",
        ),
        (lambda: convert(source, source / "config.json"), ConfigError, "is a file"),
        (lambda: convert(source, source / "config.json" / "out"), ConfigError, "cannot write"),
    ]:
        with pytest.raises(kind, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert left_behind() == []


def test_a_full_disk_is_foreseen(source, tmp_path, monkeypatch, left_behind):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(ConfigError, match=r"0\.00 GB free and the output takes 0\.07 GB"):
        convert(source, tmp_path / "out")
    assert left_behind() == []


def test_a_disk_that_fills_up_leaves_nothing(source, tmp_path, monkeypatch, left_behind):
    def full(self, name, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.ShardWriter, "append", full)
    with pytest.raises(ConfigError, match="is full"):
        convert(source, tmp_path / "out")
    assert left_behind() == []


# --- whole or not there ---------------------------------------------------------------------------------

HALF_WAY = """
import signal, sys, time
from mlxvr.conversion.quantize import convert

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what was started in the background

def stop_half_way(stage, done, total):
    if done > total // 2:
        print("half", flush=True)
        time.sleep(60)

convert(sys.argv[1], sys.argv[2], progress=stop_half_way, force=True)
"""


@pytest.fixture
def half_way(source, tmp_path):
    """A process that has written half of the output and holds there."""
    child = subprocess.Popen(
        [sys.executable, "-c", HALF_WAY, str(source), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "half\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_kill_9_leaves_no_target_and_the_next_run_cleans_up(half_way, source, tmp_path, left_behind):
    assert left_behind() == [".out.mlxvr-partial"]
    half_way.kill()
    half_way.wait()
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out")
    assert left_behind() == ["out"]
    convert(source, tmp_path / "fresh")
    for path in (tmp_path / "fresh").iterdir():
        if path.name != "README.md":  # its title is the folder's name
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_two_processes_do_not_write_one_target(half_way, source, tmp_path, left_behind):
    with pytest.raises(ConfigError, match="another process is writing"):
        convert(source, tmp_path / "out")
    assert left_behind() == [".out.mlxvr-partial"]  # the other one's work is untouched
    assert any((tmp_path / ".out.mlxvr-partial").iterdir())


def test_ctrl_c_leaves_nothing(half_way, left_behind):
    half_way.send_signal(signal.SIGINT)
    assert half_way.wait(timeout=10) != 0
    assert left_behind() == []


def test_force_replaces_a_model_folder_only_at_the_end(source, tmp_path, monkeypatch, left_behind):
    out = tmp_path / "out"
    convert(source, out, bits=8)
    old = (out / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("mlxvr.conversion.stream._write_rows", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(source, out, bits=4, force=True)
    assert (out / "model.safetensors").read_bytes() == old
    convert(source, out, bits=4, force=True)
    assert read_json(out / "mlxvr.json")["quantization"]["bits"] == 4
    assert left_behind() == ["out"]


def test_the_gap_in_replacing_is_closed_by_the_next_run(tmp_path):
    target = tmp_path / "out"
    aside = tmp_path / ".out.mlxvr-replaced"
    aside.mkdir()
    (aside / "config.json").write_text("old")
    with pytest.raises(RuntimeError), staging.staged(target, "plan"):
        raise RuntimeError("died again")
    assert (target / "config.json").read_text() == "old"
    assert not aside.exists()


def test_an_empty_folder_is_a_fine_target(source, tmp_path):
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_shard_with_bytes_missing_never_gets_its_name(tmp_path):
    tensor = shards.OutputTensor("a", "F32", (4,))
    with pytest.raises(ValueError, match="bytes of a are"), shards.write_shard(tmp_path / "s", [tensor]) as writer:
        writer.append("a", np.zeros(3, dtype="<f4"))
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="more bytes"), shards.write_shard(tmp_path / "s", [tensor]) as writer:
        writer.append("a", np.zeros(5, dtype="<f4"))


# --- the command line -----------------------------------------------------------------------------------


def test_the_command_line_prints_a_table(source, tmp_path, capsys):
    arguments = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), "--q-bits", "8", "--q-group-size", "32"]
    assert main([*arguments, "--dtype", "float16"]) == 0
    table = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert table["weights"] == "8 bits, groups of 32, the rest float16"
    assert table["recipe"] == "qwen3_vl, threshold 0.98"
    assert {"size", "bits", "time", "peak"} <= table.keys()


def test_json_is_one_object(source, tmp_path, capsys):
    assert main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), "--q-bits", "none", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bits"] == 0
    assert report["bits_per_weight"] == 16
    assert report["path"] == str(tmp_path / "out")


def test_list_recipes(capsys):
    assert main(["--list-recipes"]) == 0
    assert "videoauto-r1-qwen3-vl-8b" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--hf-path", "x"],
        ["--hf-path", "./gone", "--mlx-path", "out"],
        ["--hf-path", "x", "--mlx-path", "out", "--q-bits", "5"],
        ["--hf-path", "x", "--mlx-path", "out", "--q-bits", "0"],
        ["--hf-path", "x", "--mlx-path", "out", "--q-group-size", "48"],
        ["--hf-path", "x", "--mlx-path", "out", "--dtype", "int8"],
        ["--hf-path", "x", "--mlx-path", "out", "--recipe", "nope"],
        ["--hf-path", "x", "--mlx-path", "out", "--verify"],
        ["--hf-path", "x", "--mlx-path", "out", "--upload-repo", "org/name"],
        ["--hf", "x", "--mlx-path", "out"],
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_failures_exit_with_1_and_debug_shows_the_traceback(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mlxvr.conversion.stream._write_rows", lambda *args: 1 / 0)
    arguments = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "out")]
    assert main(arguments) == 1
    line = capsys.readouterr().err
    assert line == "error: ZeroDivisionError: division by zero (add --debug for the traceback)\n"
    assert main([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_on_the_command_line(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_convert", interrupt)
    assert main(["--hf-path", "x", "--mlx-path", "y"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_help_needs_no_mlx():
    code = "import sys; from mlxvr.convert import main; main(['--help']); assert 'mlx.core' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--q-group-size" in done.stdout


def test_every_error_of_a_conversion_is_one_of_ours():
    assert issubclass(CheckpointError, MlxvrError)
    assert issubclass(ConfigError, MlxvrError)
    assert issubclass(RecipeError, MlxvrError)
