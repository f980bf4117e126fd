"""Rewinding, follow-up questions, quantized keys and values, and caches on disk."""

import os
from pathlib import Path

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import random_media

from mlxvr.errors import ConfigError
from mlxvr.model import cache as kv
from mlxvr.model.decode import decode, prefill
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt, build_prompt


@pytest.fixture(scope="module", params=checkpoints.FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VideoModel:
    return load_model(checkpoints.write_checkpoint(tmp_path_factory.mktemp("cache") / "m", request.param))


def ask(model: VideoModel, question: str) -> Prompt:
    media = [random_media(model.family.name, "video", (5, 6, 10), second_per_grid=0.75)]
    return build_prompt(model.tokenizer, model.family, model.config, media, question)


def read(model: VideoModel, prompt: Prompt, cache: list, start: int = 0, end: int | None = None) -> mx.array:
    part = slice(start, end)
    fresh = start == 0
    return prefill(
        model,
        prompt.ids[part],
        prompt.positions[:, part],
        cache,
        features=model.encode(prompt.media) if fresh else None,
        media_mask=prompt.media_mask[part] if fresh else None,
    )


def answer(model: VideoModel, prompt: Prompt, logits: mx.array, cache: list, count: int = 12) -> list:
    return list(decode(model, logits, cache, prompt.next_position, max_tokens=count))


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_follow_up_question_is_a_fresh_one(model: VideoModel, kv_bits: int | None) -> None:
    questions = [
        ask(model, "What happens?"),
        ask(model, "Which cup holds the ball at the very end?"),
        ask(model, "Who?"),
    ]
    shared = model.make_cache(kv_bits)
    end = questions[0].prefix_length
    read(model, questions[0], shared, 0, end)
    for prompt in [*questions, questions[0]]:
        kv.trim(shared, end)
        logits = read(model, prompt, shared, end)
        fresh = model.make_cache(kv_bits)
        read(model, prompt, fresh, 0, end)
        expected = read(model, prompt, fresh, end)
        np.testing.assert_allclose(np.array(logits), np.array(expected), atol=1e-4)
        ours, theirs = answer(model, prompt, logits, shared), answer(model, prompt, expected, fresh)
        assert [token.id for token in ours] == [token.id for token in theirs]
        np.testing.assert_allclose([t.logprob for t in ours], [t.logprob for t in theirs], atol=1e-4)


def test_a_follow_up_equals_a_prompt_read_in_one_piece(model: VideoModel) -> None:
    first, second = ask(model, "What happens?"), ask(model, "Which cup holds the ball?")
    cache = model.make_cache()
    answer(model, first, read(model, first, cache), cache)
    kv.trim(cache, first.prefix_length)
    logits = read(model, second, cache, first.prefix_length)
    whole = model.make_cache()
    np.testing.assert_allclose(np.array(logits), np.array(read(model, second, whole)), atol=1e-4)


def test_rewinding_is_exact(model: VideoModel) -> None:
    prompt = ask(model, "What happens?")
    cache = model.make_cache()
    logits = read(model, prompt, cache)
    grown = 256 - len(prompt.ids) % 256 + 20  # beyond the room that is reserved
    once = answer(model, prompt, logits, cache, grown)
    kv.trim(cache, len(prompt.ids))
    assert answer(model, prompt, logits, cache, grown) == once


def test_length_and_bounds(model: VideoModel) -> None:
    prompt = ask(model, "What happens?")
    cache = model.make_cache()
    assert kv.length(cache) == 0
    assert kv.nbytes(cache) == 0
    read(model, prompt, cache)
    assert kv.length(cache) == len(prompt.ids)
    text = model.config["text_config"]
    reserved = -(-len(prompt.ids) // 256) * 256
    assert kv.nbytes(cache) == 3 * 2 * text["num_key_value_heads"] * 32 * 4 * reserved
    for bad in (len(prompt.ids) + 1, -1):
        with pytest.raises(ValueError, match="cannot rewind"):
            kv.trim(cache, bad)
    kv.trim(cache, 0)
    assert kv.length(cache) == 0


@pytest.mark.parametrize(("kv_bits", "tolerance"), [(8, 0.007), (6, 0.035), (4, 0.15), (3, 0.3), (2, 0.5)])
def test_quantized_keys_and_values_stay_close(model: VideoModel, kv_bits: int, tolerance: float) -> None:
    """On an x86 CPU the errors are at most 0.0023, 0.011, 0.047, 0.089 and 0.16."""
    prompt = ask(model, "What happens?")
    expected = np.array(read(model, prompt, model.make_cache()))
    cache = model.make_cache(kv_bits)
    logits = np.array(read(model, prompt, cache))
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 0 < error < tolerance
    text = model.config["text_config"]
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    room = -(-len(prompt.ids) // 256) * 256
    numbers = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * room * head_dim
    scales = 2 * numbers // 32 * 4  # a scale and a bias in float32 for 32 numbers
    assert kv.nbytes(cache) == numbers * kv_bits // 8 + scales
    assert len(answer(model, prompt, mx.array(logits), cache)) == 12


@pytest.mark.parametrize("bits", [1, 5, 16, "4"])
def test_bits_that_cannot_be(model: VideoModel, bits: object) -> None:
    with pytest.raises(ConfigError, match="kv_bits"):
        model.make_cache(bits)


def test_heads_that_cannot_be_quantized() -> None:
    with pytest.raises(ConfigError, match="heads have 40 numbers"):
        kv.make(2, head_dim=40, kv_bits=4)


@pytest.mark.parametrize("kv_bits", [None, 4])
def test_a_saved_cache_goes_on_as_it_was(model: VideoModel, kv_bits: int | None, tmp_path: Path) -> None:
    prompt = ask(model, "What happens?")
    cache = model.make_cache(kv_bits)
    read(model, prompt, cache, 0, prompt.prefix_length)
    kv.save(cache, tmp_path / "clip.cache", {"model": "m", "note": "ü"})
    assert sorted(os.listdir(tmp_path)) == ["clip.cache"]
    restored, notes = kv.load(tmp_path / "clip.cache")
    assert notes == {"model": "m", "note": "ü"}
    assert kv.length(restored) == prompt.prefix_length
    logits = read(model, prompt, cache, prompt.prefix_length)
    again = read(model, prompt, restored, prompt.prefix_length)
    np.testing.assert_array_equal(np.array(again), np.array(logits))
    assert answer(model, prompt, again, restored) == answer(model, prompt, logits, cache)


def test_a_rewound_cache_is_saved_without_what_it_forgot(model: VideoModel, tmp_path: Path) -> None:
    prompt = ask(model, "What happens?")
    cache = model.make_cache()
    logits = read(model, prompt, cache)
    answer(model, prompt, logits, cache)
    kv.trim(cache, 10)
    kv.save(cache, tmp_path / "a")
    restored, _ = kv.load(tmp_path / "a")
    assert restored[0].keys.shape[2] == kv.length(restored) == 10


def test_bfloat16_survives_the_disk(model: VideoModel, tmp_path: Path) -> None:
    cache = model.make_cache()
    for layer in cache:
        layer.update_and_fetch(mx.ones((1, 2, 3, 32), mx.bfloat16), mx.zeros((1, 2, 3, 32), mx.bfloat16))
    kv.save(cache, tmp_path / "a")
    restored, _ = kv.load(tmp_path / "a")
    assert restored[0].keys.dtype == mx.bfloat16
    assert bool((restored[2].keys == 1).all())


def test_files_that_are_no_cache(model: VideoModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as a saved cache"):
        kv.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("x" * 100)
    with pytest.raises(ConfigError, match="cannot be read as a saved cache"):
        kv.load(tmp_path / "text")
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"x": mx.zeros(2)})
    with pytest.raises(ConfigError, match="no saved cache"):
        kv.load(tmp_path / "other.safetensors")


def test_a_failed_save_leaves_nothing(model: VideoModel, tmp_path: Path) -> None:
    cache = model.make_cache()
    for layer in cache:
        layer.update_and_fetch(mx.ones((1, 2, 3, 32)), mx.ones((1, 2, 3, 32)))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        kv.save(cache, tmp_path / "taken")
    with pytest.raises(ConfigError, match="cannot be written"):
        kv.save(cache, tmp_path / "nowhere" / "a")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_backend_without_kernels_for_packed_keys_is_refused_in_one_line(monkeypatch):
    """As MLX's CUDA backend raises where a head is one group."""

    def missing(*_, **__):
        raise RuntimeError("[quantized_matmul] No implementation for problem shape: 296x296x32x6, transpose: true")

    kv._has_kernels.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(mx, "quantized_matmul", missing)
            with pytest.raises(ConfigError, match="no kernel for keys and values of 8 bits in heads of 32 numbers"):
                kv.make(2, head_dim=32, kv_bits=8)
    finally:
        kv._has_kernels.cache_clear()
    assert len(kv.make(2, head_dim=128, kv_bits=8)) == 2


def test_a_cache_grows_by_the_step_that_estimates_count_with():
    for kv_bits in (None, 8):
        (layer,) = kv.make(1, head_dim=64, kv_bits=kv_bits)
        assert layer.step == kv.CACHE_STEP
