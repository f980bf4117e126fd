"""What a question is estimated to take, against what MLX's allocator held on its CPU backend."""

import json

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import random_media

from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.errors import ConfigError
from mlxvr.model import cache as kv
from mlxvr.model import decode, memory_plan
from mlxvr.model.loading import load_model, weight_bytes
from mlxvr.model.memory_plan import PromptSize
from mlxvr.runtime import device_memory

on_cpu = pytest.mark.skipif(
    device_memory.backend() != "cpu", reason="attention is fused elsewhere, and peaks are the backend's"
)

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
DEEP = {"hidden_size": 128, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 5}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of a family, text settings and dtype, made once."""
    known = {}

    def make(family, text, dtype):
        key = (family, json.dumps(text), dtype)
        if key not in known:
            text = {**text, "max_position_embeddings": 8192}
            if family == "qwen3_vl":
                text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
            folder = tmp_path_factory.mktemp("plan") / "model"
            vision = {"out_hidden_size": text["hidden_size"], "hidden_size": 128, "intermediate_size": 256}
            known[key] = load_model(checkpoints.write_checkpoint(folder, family, text=text, vision=vision, dtype=dtype))
        return known[key]

    return make


def settings(model):
    return {"itemsize": model.layers[0].input_layernorm.weight.dtype.size, "is_fused": False}


def measured(work):
    """The most bytes that `work` held beside what there was before, and what it returned."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = work()
    return mx.get_peak_memory() - before, result


@on_cpu
@pytest.mark.parametrize(
    ("family", "text", "dtype", "kv_bits", "tokens", "step"),
    [
        ("qwen2_5_vl", WIDE, "F32", None, 800, 2048),
        ("qwen2_5_vl", WIDE, "BF16", None, 900, 256),
        ("qwen3_vl", WIDE, "F32", None, 1100, 512),
        ("qwen3_vl", DEEP, "BF16", None, 700, 2048),
        ("qwen2_5_vl", DEEP, "F32", None, 600, 128),
        ("qwen3_vl", DEEP, "F32", 8, 400, 128),
        ("qwen2_5_vl", WIDE, "BF16", 4, 400, 512),
    ],
)
def test_reading_a_prompt_takes_what_was_planned(models, family, text, dtype, kv_bits, tokens, step):
    model = models(family, text, dtype)
    ids = np.random.default_rng(0).integers(0, 400, tokens).astype(np.int32)
    positions = np.tile(np.arange(tokens, dtype=np.int32), (3, 1))
    cache = model.make_cache(kv_bits)
    peak, _ = measured(lambda: mx.eval(decode.prefill(model, ids, positions, cache, step_size=step)))
    plan = memory_plan.plan_prompt(
        model.config,
        PromptSize(prompt_tokens=tokens, answer_tokens=0, step_size=step, kv_bits=kv_bits, **settings(model)),
    )
    assert plan.peak == pytest.approx(peak, rel=0.2)


@on_cpu
@pytest.mark.parametrize(
    ("family", "text", "dtype", "grid"),
    [
        ("qwen2_5_vl", WIDE, "F32", (6, 16, 20)),
        ("qwen3_vl", WIDE, "F32", (6, 16, 20)),
        ("qwen3_vl", DEEP, "BF16", (1, 32, 32)),
        ("qwen2_5_vl", DEEP, "BF16", (1, 32, 32)),
        ("qwen3_vl", DEEP, "F32", (24, 12, 12)),
    ],
)
def test_looking_at_a_clip_takes_what_was_planned(models, family, text, dtype, grid):
    model = models(family, text, dtype)
    media = [random_media(family, "video" if grid[0] > 1 else "image", grid)]
    peak, features = measured(lambda: model.encode(media))
    plan = memory_plan.plan_prompt(
        model.config, PromptSize(prompt_tokens=0, answer_tokens=0, grids=[grid], **settings(model))
    )
    assert plan.features == sum(array.nbytes for array in (features.embeds, *features.deepstack))
    assert plan.peak == pytest.approx(peak, rel=0.2)


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
@pytest.mark.parametrize(("dtype", "kv_bits"), [("F32", None), ("BF16", None), ("F32", 8), ("BF16", 4)])
def test_a_cache_takes_what_was_planned_to_the_byte(models, family, dtype, kv_bits):
    model = models(family, WIDE, dtype)
    for tokens in (1, 300):
        cache = model.make_cache(kv_bits)
        positions = np.tile(np.arange(tokens, dtype=np.int32), (3, 1))
        mx.eval(decode.prefill(model, np.zeros(tokens, np.int32), positions, cache))
        planned = memory_plan.cache_bytes(model.config, tokens, itemsize=settings(model)["itemsize"], kv_bits=kv_bits)
        assert planned == kv.nbytes(cache)


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
@pytest.mark.parametrize(("stored", "dtype"), [("F32", None), ("BF16", None), ("BF16", "float32"), ("F32", "float16")])
def test_weights_take_what_was_planned_to_the_byte(tmp_path, family, stored, dtype):
    from mlx.utils import tree_flatten

    folder = checkpoints.write_checkpoint(tmp_path / "model", family, dtype=stored, shards=2)
    loaded = load_model(folder, dtype=dtype)
    assert weight_bytes(ModelFolder.open(folder), dtype=dtype) == sum(
        array.nbytes for _, array in tree_flatten(loaded.network.parameters())
    )


def test_packed_weights_take_what_was_planned_to_the_byte(tmp_path):
    from mlx.utils import tree_flatten

    from mlxvr.conversion.quantize import convert

    source = checkpoints.write_checkpoint(tmp_path / "model", "qwen3_vl")
    convert(source, tmp_path / "packed", bits=4, group_size=32)
    for dtype in (None, "float32"):
        loaded = load_model(tmp_path / "packed", dtype=dtype)
        assert weight_bytes(ModelFolder.open(tmp_path / "packed"), dtype=dtype) == sum(
            array.nbytes for _, array in tree_flatten(loaded.network.parameters())
        )
    with pytest.raises(ConfigError, match="float8"):
        weight_bytes(ModelFolder.open(source), dtype="float8")


def qwen3_8b():
    """What counts of Qwen3-VL-8B's settings."""
    text = {"hidden_size": 4096, "intermediate_size": 12_288, "num_attention_heads": 32, "num_key_value_heads": 8}
    text |= {"head_dim": 128, "num_hidden_layers": 36}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "spatial_merge_size": 2}
    vision |= {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "out_hidden_size": 4096,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision}


def test_numbers_of_a_real_model():
    """147,456 bytes a token: 36 layers * 8 heads * 128 numbers * keys and values * 2 bytes."""
    config = qwen3_8b()
    assert memory_plan.cache_bytes(config, 16_384) == 16_384 * 147_456
    # in 8 bits a byte for each number, and a scale and a bias of 2 bytes for 64 of them
    assert memory_plan.cache_bytes(config, 16_384, kv_bits=8) == 16_384 * 147_456 * (64 + 4) // 128
    assert memory_plan.cache_bytes(config, 100) == 256 * 147_456
    whole = memory_plan.plan_prompt(config, PromptSize(prompt_tokens=16_640, answer_tokens=4096, grids=[(64, 32, 32)]))
    assert whole.features == 64 * 256 * 4096 * 4 * 2
    assert whole.keys_values == 20_736 * 147_456
    follow_up = memory_plan.plan_prompt(
        config, PromptSize(prompt_tokens=16_640, answer_tokens=4096, held_tokens=16_600)
    )
    assert follow_up.features == follow_up.vision == 0
    assert follow_up.prefill < whole.prefill / 5


def test_steps_shrink_as_the_context_grows():
    config = qwen3_8b()
    for is_fused, most in ((True, 2**25), (False, 2**28 // 32)):
        steps = [memory_plan.step_limit(config, held, is_fused=is_fused) for held in (0, 1000, 16_384, 65_536, 250_000)]
        assert steps == sorted(steps, reverse=True)
        for held, step in zip((0, 1000, 16_384, 65_536), steps):
            assert step % 64 == 0
            assert step * (held + step) <= most
            assert (step + 64) * (held + step + 64) > most
    assert memory_plan.step_limit(config, 10_000) > 2048  # the default step is not touched where it does no harm
    assert memory_plan.step_limit(config, 10**7, is_fused=False) == 64


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_shrinking_steps_read_the_same(models, family, monkeypatch):
    """Rounding aside: each step's sums are of other lengths."""
    model = models(family, WIDE, "F32")
    ids = np.random.default_rng(0).integers(0, 400, 700).astype(np.int32)
    positions = np.tile(np.arange(700, dtype=np.int32), (3, 1))
    whole = np.array(decode.prefill(model, ids, positions, model.make_cache()))
    monkeypatch.setattr(memory_plan, "_PAIRS_AT_ONCE", 2**16)
    seen = []
    cache = model.make_cache()
    told = decode.prefill(model, ids, positions, cache, progress=lambda _, done, __: seen.append(done))
    np.testing.assert_allclose(np.array(told), whole, atol=1e-4)
    steps = np.diff([0, *seen])
    assert steps[0] == 256
    assert steps[-2] == 64
    assert (np.diff(steps[:-1]) <= 0).all()
    assert kv.length(cache) == 700
