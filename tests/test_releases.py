"""config.json as six releases of transformers write it: what they mean, that they run, what conversion makes of it.

`releases/configs` holds what the releases themselves saved; `releases/make.py` writes it. "made" is a model made with a
release and saved, "saved-again" the published config of Qwen2.5-VL (everything at the root) or Qwen3-VL loaded and
saved by a later release, which is what a fine-tune holds.
"""

import json
from pathlib import Path

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import random_media

from mlxvr.conversion.quantize import convert
from mlxvr.media.patches import normalise
from mlxvr.model.families.base import family_of
from mlxvr.model.loading import load_model
from mlxvr.model.prompt import build_prompt

FILES = [json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "releases" / "configs").glob("*"))]
CONFIGS = {f"{file['transformers']}/{name}": config for file in FILES for name, config in file["configs"].items()}
TENSORS = {f"{file['transformers']}/{name}": names for file in FILES for name, names in file["tensors"].items()}
TOKENS = {"image_token_id": 446, "video_token_id": 447, "vision_end_token_id": 444, "vision_start_token_id": 443}
VISION_KEYS = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size", "in_channels")
TEXT_KEYS = (
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "vocab_size",
)


def nulls(config: dict) -> set[str]:
    """Keys that are null anywhere in a config."""
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    inside = {f"{name}.{key}" for name, section in sections.items() for key in nulls(section)}
    return inside | {key for key, value in config.items() if value is None}


def write_model(folder: Path, name: str) -> Path:
    """A tiny checkpoint with random weights, under a release's config.json and tensor names."""
    _, family, kind = name.split("/")
    tied = not any(tensor.startswith("lm_head.") for tensor in TENSORS[name])
    spelling = "new" if any(tensor.startswith("model.language_model.") for tensor in TENSORS[name]) else "old"
    assert tied == ("tied" in kind) or "made-tied" in kind
    checkpoints.write_checkpoint(folder, family, names=spelling, tied=tied)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder


def ask(model, seconds: float = 1.5):
    """A prompt with a video and an image."""
    name = model.family.name
    media = [
        random_media(name, "video", (4, 6, 8), second_per_grid=seconds),
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


def test_the_nulls_that_were_the_fault_are_there() -> None:
    assert {"text_config.image_token_id", "text_config.video_token_id"} <= nulls(
        CONFIGS["4.52.4/qwen2_5_vl/saved-again"]
    )
    assert {
        name.split("/")[0] for name, config in CONFIGS.items() if "text_config.image_token_id" in nulls(config)
    } == {
        "4.52.4",
        "4.55.4",
    }
    assert len(CONFIGS) == 36


@pytest.mark.parametrize("name", CONFIGS)
def test_every_release_means_the_same_network(name: str) -> None:
    release, family, _ = name.split("/")
    found = family_of(CONFIGS[name]).mlx_config(CONFIGS[name])
    text = {**checkpoints.text_settings(family), "rope_theta": 500_000.0 if family == "qwen3_vl" else 1_000_000.0}
    section = [6, 5, 5] if family == "qwen3_vl" else [4, 6, 6]
    text["rope_scaling"] = {"type": "default", "mrope_section": section}
    assert {key: found["text_config"][key] for key in TEXT_KEYS} == {key: text[key] for key in TEXT_KEYS}
    vision = checkpoints.vision_settings(family)
    assert {key: found["vision_config"][key] for key in VISION_KEYS} == {key: vision[key] for key in VISION_KEYS}
    assert {key: found[key] for key in TOKENS} == TOKENS
    assert not [key for key in nulls(found) if "." in key or (key.endswith("token_id") and key in TOKENS)]
    has_head = any(tensor.startswith("lm_head.") for tensor in TENSORS[name])
    assert found["tie_word_embeddings"] is not has_head
    assert found["transformers_version"] == release


@pytest.mark.parity
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
@pytest.mark.parametrize("nested", [False, True])
def test_a_head_that_differs_from_the_embedding_is_used_whatever_the_config_says(
    family: str, nested: bool, tmp_path: Path
) -> None:
    """As transformers 5 does; 4.57 writes such folders where the root alone ties them."""
    pytest.importorskip("torch")
    from reference import Reference, relative_error

    path = checkpoints.write_checkpoint(tmp_path / "m", family, shards=3)
    config = json.loads((path / "config.json").read_text())
    config["tie_word_embeddings"] = True
    config["text_config"] |= {"tie_word_embeddings": True} if nested else {}
    (path / "config.json").write_text(json.dumps(config))
    model = load_model(path)
    prompt = ask(model)
    reference = Reference(path, family)
    pixels = [normalise(item.patches, model.spec) for item in prompt.media]
    expected = reference.logits(reference.inputs(prompt.ids, prompt.media, pixels))
    assert relative_error(logits_of(model, prompt), expected) <= 1e-4
    convert(path, tmp_path / "out", bits=0, dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert relative_error(logits_of(load_model(tmp_path / "out"), prompt), expected) <= 1e-4


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_a_copy_of_the_embedding_as_head_is_left_out(family: str, tmp_path: Path) -> None:
    embedding = {}

    def copy(name: str, array: np.ndarray) -> np.ndarray:
        if name.endswith("embed_tokens.weight"):
            embedding["weight"] = array
        return embedding["weight"] if name == "lm_head.weight" else array

    path = checkpoints.write_checkpoint(tmp_path / "m", family, weights=copy)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    convert(path, tmp_path / "out", bits=0, dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head" not in load_model(tmp_path / "out").network.language_model


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith("saved-again")])
def test_a_conversion_keeps_the_meaning_and_writes_no_null_token(name: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", name)
    convert(source, tmp_path / "out", bits=0, dtype="float32")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written[key] for key in TOKENS} == TOKENS
    assert not TOKENS.keys() & {key.rpartition(".")[2] for key in nulls(written)}
    assert written["transformers_version"] == name.split("/")[0]
    before, after = load_model(source), load_model(tmp_path / "out")
    prompt = ask(before, seconds=2.75)  # whole seconds and floats differ here
    np.testing.assert_array_equal(ask(after, seconds=2.75).positions, prompt.positions)
    np.testing.assert_allclose(logits_of(after, prompt), logits_of(before, prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "saved-again" in name else [pytest.mark.slow]) for name in CONFIGS]
)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import torch
    from reference import Reference, relative_error

    path = write_model(tmp_path, name)
    model = load_model(path)
    prompt = ask(model)
    reference = Reference(path, model.family.name)
    pixels = [normalise(item.patches, model.spec) for item in prompt.media]
    inputs = reference.inputs(prompt.ids, prompt.media, pixels)
    positions = torch.tensor(prompt.positions.astype(np.int64))[:, None]  # of the release that wrote the config
    expected = reference.logits(inputs, position_ids=positions)
    assert relative_error(logits_of(model, prompt), expected) <= 1e-4
