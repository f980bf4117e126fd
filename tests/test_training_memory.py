"""The memory that training is said to need: against what it takes, against numbers worked out by hand, and the refusal.

Peaks are measured here, on MLX's CPU backend, beyond what was held before.
"""

import gc
import json
import re
from types import SimpleNamespace

import checkpoints
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from groups import make_group
from mlx.utils import tree_flatten

from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.errors import OutOfMemoryError
from mlxvr.grpo.memory.memory_estimate import estimate
from mlxvr.grpo.memory.workload import Workload, workload_of
from mlxvr.grpo.step.gradient import group_gradient
from mlxvr.grpo.step.lora import attach, lora_weights
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.grpo.step.loss_config import LossConfig
from mlxvr.grpo.step.rollout import prefill_step, rollout
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.grpo.trainer import train
from mlxvr.model.families.base import family_of
from mlxvr.model.loading import load_model

on_cpu = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="peaks are calibrated on the CPU")

TEXT = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# The smallest model whose memory can be worked out by hand: one layer, no heads' norms.
HAND = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
    },
    "vision_config": {},
}


def make_model(folder, family, *, bits=None, rank=16, keys=None, **text):
    own = {"head_dim": 64} if family == "qwen3_vl" else {}
    model = load_model(checkpoints.write_checkpoint(folder, family, text=TEXT | own | text))
    if bits is not None:
        nn.quantize(model.network.language_model, group_size=64, bits=bits)
    attach(model, LoraConfig(rank=rank, **({"target_modules": keys} if keys else {})), seed=0)
    mx.eval(model.network.parameters())
    return model


def clip(rows):
    """A clip of 25 tokens a row."""
    return [("video", (rows, 10, 10), 1.0)]


def asked(group, lengths):
    return {
        "prompt_tokens": len(group.prompt.ids),
        "visual_tokens": int(group.prompt.media_mask.sum()),
        "frame_tokens": 25,
        "group_size": len(lengths),
        "completion_tokens": max(lengths),
        "prefill_step": prefill_step(2048),
    }


def taken(work):
    """Bytes that `work` takes beyond what was held before."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    return mx.get_peak_memory() - before


@on_cpu
@pytest.mark.parametrize(
    ("family", "rows", "lengths", "checkpoint", "how"),
    [
        ("qwen3_vl", 12, [32] * 4, False, {}),
        pytest.param("qwen3_vl", 12, [32] * 4, True, {"bits": 4}, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", 40, [24] * 6, True, {}, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", 40, [24] * 6, False, {"keys": ("q_proj", "v_proj")}, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", 12, [64] * 12, True, {"vocab_size": 16384}, marks=pytest.mark.slow),
    ],
)
def test_gradient_takes_what_was_estimated(tmp_path, family, rows, lengths, checkpoint, how):
    model = make_model(tmp_path / "m", family, **how)
    group = make_group(model, lengths=lengths, media=clip(rows))
    expected = estimate(workload_of(model, checkpoint=checkpoint, **asked(group, lengths))).gradient
    gains = np.linspace(-1, 1, len(lengths)).astype(np.float32)
    policy = LossConfig(beta=0.0)
    found = taken(lambda: group_gradient(model, group, gains, config=policy, checkpoint=checkpoint))
    assert found == pytest.approx(expected, rel=0.2)


@on_cpu
@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_rollout_takes_what_was_estimated(tmp_path, family):
    model = make_model(tmp_path / "m", family)
    model.tokenizer.eos_ids = frozenset()
    lengths = [16] * 8
    group = make_group(model, lengths=lengths, media=clip(40))
    group.prompt.row = SimpleNamespace(line="row 1", response_prefix="")
    need = estimate(workload_of(model, checkpoint=False, **asked(group, lengths)))
    found = taken(
        lambda: rollout(model, group.prompt, SamplingConfig(max_tokens=16, seed=0, temperature=1.0), group_size=8)
    )
    assert found == pytest.approx(need.cache + max(need.prefill, need.decode), rel=0.2)


@on_cpu
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_vision_tower_takes_what_was_estimated(tmp_path, family):
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_heads": 4}
    model = load_model(checkpoints.write_checkpoint(tmp_path / "m", family, vision=vision))
    media = [checkpoints.random_media(family, "video", (8, 16, 16))]
    need = estimate(
        workload_of(
            model,
            prompt_tokens=600,
            visual_tokens=8 * 64,
            frame_tokens=64,
            group_size=2,
            completion_tokens=8,
            checkpoint=True,
        )
    )
    assert taken(lambda: model.encode(media)) == pytest.approx(need.vision, rel=0.25)


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"group_size": 6, "batch_size": 2},
        {"group_size": 8, "batch_size": 2, "gradient_checkpointing": True},
        {"group_size": 2, "batch_size": 4, "gradient_checkpointing": True},  # 3 prompts more wait for their turn
    ],
)
def test_a_run_takes_what_it_said_before(tmp_path, how):
    """The bundled model on the bundled clips; no completion ends before its limit."""
    told = []
    settings = {"data": demo_folder() / "clips.jsonl", "dtype": "float32", "max_completion_tokens": 8, "steps": 1}
    settings |= {"skip_zero_advantage": False, "temperature": 1.5}
    train(TrainConfig(output=tmp_path, **settings, **how), on_note=told.append)
    entry = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert entry["completions/clipped_ratio"] > 0.5
    said = next(line.split() for line in told if line.startswith("peak"))
    assert said[2] == "MB"
    assert 1e6 * float(said[1]) == pytest.approx(entry["peak_memory"], rel=0.2)


def hand(**change):
    """A prompt of 10 tokens, 2 completions of 4: 16 columns. LoRA of rank 2 on every projection."""
    given = {
        "weight_bytes": 5000,
        "adapter_parameters": 2 * (16 + 12 + 12 + 16 + 24 + 24 + 24),
        "prompt_tokens": 10,
        "visual_tokens": 0,
        "group_size": 2,
        "completion_tokens": 4,
        "checkpoint": False,
        "itemsize": 4,
        "backend": "cuda",
    }
    return estimate(Workload(config=HAND, **(given | change)))


def test_what_stays_is_counted_by_hand():
    need = hand()
    assert (need.weights, need.adapters, need.features) == (5000, 256 * 4, 0)
    assert need.optimizer == 3 * 256 * 4  # two moments and the gradients' sum
    assert need.resident == 5000 + 4 * 256 * 4
    assert hand(accumulate=False).optimizer == 2 * 256 * 4
    assert hand(keep_reference=True).adapters == 2 * 256 * 4
    # 10 + 2 * 4 tokens take 256 columns of keys and values, 4 numbers wide; the layer that grows has them twice
    assert need.cache == 2 * 256 * 2 * 4 * 4


def test_what_a_layer_keeps_is_counted_by_hand():
    # Input and sum (8 each); norms' outputs (8 each), attention's output (8) and the MLP's product (16) for LoRA;
    # queries (8), keys and values (4 each); gate, up, sigmoid and silu (16 each); 7 short products of 2.
    each = 8 + 8 + 8 + 8 + 8 + 16 + 8 + 4 + 4 + 4 * 16 + 7 * 2
    assert hand().saved == 16 * each * 4
    # Attention is computed again: its scores, fused or not, are not among what is kept.
    assert hand(backend="metal").saved == hand().saved
    # Computed in two bytes, every module with LoRA has a float32 copy of its own input.
    plain = 8 + 8 + 8 + 4 + 4 + 4 * 16
    own = 5 * 8 + 8 + 16 + 7 * 2
    assert hand(itemsize=2).saved == 16 * (plain * 2 + own * 4)
    # Computed again: the inputs, 16 x 8, or the gradients and one input, whatever is more.
    assert hand(checkpoint=True).saved == max(16 * 8, 256 + 16 * 8) * 4


def test_scores_of_one_block_are_counted_by_hand():
    # The prompt is one block of 10 x 10; both completions share one of 6 x 16, which is smaller. Two heads, six arrays.
    assert hand(backend="metal").attention == 6 * 2 * 100 * 4
    assert hand().attention == 0
    # 4 completions: 12 x 22 are more than the prompt's.
    assert hand(backend="metal", group_size=4).attention == 6 * 2 * (12 * 22) * 4
    # A long completion goes alone, 256 queries at a time, and sees the prompt and itself.
    assert hand(backend="metal", completion_tokens=301).attention == 6 * 2 * (256 * 310) * 4


@pytest.mark.parametrize(
    "more",
    [
        {"prompt_tokens": 300},
        {"group_size": 4},
        {"completion_tokens": 400},
        {"adapter_parameters": 4096},
        {"weight_bytes": 90_000},
    ],
)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_more_work_needs_more(more, checkpoint):
    assert hand(checkpoint=checkpoint, **more).peak > hand(checkpoint=checkpoint).peak


def true_shape(prompt, group, *, checkpoint, **more):
    """The gradient of a group of Qwen3-VL-8B, 4 bits in groups of 64, LoRA of rank 16 on every projection."""
    text = checkpoints.text_settings("qwen3_vl") | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    vision = checkpoints.vision_settings("qwen3_vl") | {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
        "out_hidden_size": 4096,
    }
    ids = {token: index for index, token in enumerate(checkpoints.SPECIAL_TOKENS)}
    raw = checkpoints.make_config("qwen3_vl", text, vision, ids)
    config = family_of(raw).mlx_config(raw)
    rows = sum(inputs + outputs for inputs, outputs in [(4096, 4096)] * 2 + [(4096, 1024)] * 2 + [(4096, 12288)] * 3)
    work = Workload(
        config=config,
        weight_bytes=5_800_000_000,
        adapter_parameters=36 * 16 * rows,
        prompt_tokens=prompt,
        visual_tokens=prompt - 30,
        frame_tokens=180,
        group_size=group,
        completion_tokens=256,
        checkpoint=checkpoint,
        itemsize=2,
        quantized=True,
        backend="cuda",
        **more,
    )
    return estimate(work)


@pytest.mark.parametrize(
    ("prompt", "group", "checkpoint", "measured"),
    [
        (2048, 8, True, 20.7),
        (2048, 16, True, 20.4),
        (4096, 8, True, 19.7),
        (2300, 8, False, 62.0),
        (4400, 8, False, 86.9),
    ],
)
def test_gradient_of_the_true_shape_on_cuda(prompt, group, checkpoint, measured):
    """Peaks in GB that MLX reported on an H100, weights included; the last two stand in `benchmarks/README.md`."""
    need = true_shape(prompt, group, checkpoint=checkpoint)
    found = need.weights + need.adapters + need.features + need.gradient
    assert found / 1e9 == pytest.approx(measured, rel=0.25)


def test_loaded_model_says_what_it_is(tmp_path):
    model = make_model(tmp_path / "m", "qwen3_vl", bits=4, rank=8, keys=("q_proj", "down_proj"))
    sizes = {"prompt_tokens": 90, "visual_tokens": 40, "group_size": 3, "completion_tokens": 20, "checkpoint": True}
    work = workload_of(model, beta=0.01, **sizes)
    own = lora_weights(model)
    assert work.adapter_parameters == 4 * 8 * ((256 + 256) + (768 + 256)) == sum(one.size for one in own.values())
    total = sum(one.nbytes for _, one in tree_flatten(model.network.parameters()))
    assert work.weight_bytes == total - 4 * work.adapter_parameters
    assert (work.itemsize, work.quantized, set(work.target_modules)) == (4, True, {"q_proj", "down_proj"})
    assert (work.prompt_tokens, work.beta, work.checkpoint) == (90, 0.01, True)


def test_description_is_aligned_and_names_the_peak():
    need = true_shape(2048, 8, checkpoint=False)
    lines = need.describe().split("\n")
    assert len({line.index("GB") if "GB" in line[:30] else line.index("MB") for line in lines}) == 1
    assert lines[0].split()[:3] == ["weights", "5.8", "GB"]
    assert lines[-1].split()[:3] == ["peak", f"{need.peak / 1e9:.1f}", "GB"]
    assert "what layers keep for the backward pass" in lines[-1]
    again = true_shape(2048, 8, checkpoint=True).describe().split("\n")
    assert "the logits" in again[-1]


def test_refusal_says_which_flag_to_lower():
    need = true_shape(2048, 8, checkpoint=False)
    need.refuse_over(need.peak)
    with pytest.raises(OutOfMemoryError) as error:
        need.refuse_over(24_000_000_000)
    message = str(error.value)
    assert f"about {need.peak / 1e9:.1f} GB" in message
    assert "24.0 GB are allowed" in message
    assert "\n" not in message
    found = re.findall(r"(--[a-z-]+)(?: (\d+))? \(([\d.]+) GB\)", message)
    flags = [flag for flag, _, _ in found]
    assert flags[0] == "--gradient-checkpointing"
    assert {"--group-size", "--max-completion-tokens", "--video-tokens", "--rank"} <= set(flags)
    assert "4 bits" not in message  # it has no more
    sizes = [float(size) for _, _, size in found]
    assert sizes == sorted(sizes)
    assert sizes[-1] < need.peak / 1e9
    assert dict(zip(flags, found))["--group-size"][1:] == (
        "4",
        f"{true_shape(2048, 4, checkpoint=False).peak / 1e9:.1f}",
    )
    again = true_shape(2048, 8, checkpoint=True)
    assert f"{again.peak / 1e9:.1f}" == found[0][2]
    with pytest.raises(OutOfMemoryError) as error:
        again.refuse_over(8_000_000_000)
    assert "--gradient-checkpointing" not in str(error.value)


def test_weights_that_could_be_smaller_are_named(tmp_path):
    model = make_model(tmp_path / "m", "qwen3_vl")
    sizes = {"prompt_tokens": 90, "visual_tokens": 40, "group_size": 2, "completion_tokens": 20, "checkpoint": True}
    with pytest.raises(OutOfMemoryError, match="weights of 4 bits"):
        estimate(workload_of(model, **sizes)).refuse_over(1_000_000)


def test_prompts_that_wait_for_their_turn_are_counted():
    one, eight = (true_shape(2048, 8, checkpoint=True, rows=rows, ranks=1) for rows in (1, 8))
    features = 4 * (2048 - 30) * 4096 * 2  # embeddings and three levels of deepstack, two bytes a number
    assert one.features == features
    assert eight.peak - one.peak == 7 * features
    assert true_shape(2048, 8, checkpoint=True, rows=8, ranks=3).features == 3 * features
    assert "of the 8 prompts of a step" in eight.describe()
    with pytest.raises(OutOfMemoryError, match=r"--batch-size 4 \("):
        eight.refuse_over(8_000_000_000)


def test_a_refusal_tells_small_sizes_apart(tmp_path):
    sizes = {"prompt_tokens": 3000, "visual_tokens": 40, "group_size": 8, "completion_tokens": 100, "checkpoint": True}
    need = estimate(workload_of(make_model(tmp_path / "m", "qwen3_vl"), **sizes))
    assert 1e8 < need.peak < 1e9
    with pytest.raises(OutOfMemoryError) as error:
        need.refuse_over(need.peak - 2_000_000)
    found = re.match(r"training needs about ([\d.]+) MB, mostly .+; ([\d.]+) MB are allowed", str(error.value))
    assert float(found[1]) - float(found[2]) == pytest.approx(2.0, abs=0.11)
