"""The output head gives what the stored weights say, in float32: against float64 products in numpy."""

import json
from pathlib import Path

import checkpoints
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxvr.answering.confidence import score_first_answer
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.media import load_vision
from mlxvr.model import head as module_under_test
from mlxvr.model.decode import decode, prefill
from mlxvr.model.head import Head
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import build_prompt

ROWS, WIDTH = 300, 128
HALVES = [mx.bfloat16, mx.float16]


def as_float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def unpacked(module: nn.Module) -> np.ndarray:
    """Affine weights by their formula, scale * q + bias, from the 32-bit words: float64 (rows, width)."""
    words, bits = np.array(module.weight), module.bits
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = ((words[:, :, None] >> shifts) & (2**bits - 1)).reshape(len(words), -1).astype(np.float64)
    scales, biases = (as_float64(part).repeat(module.group_size, axis=1) for part in (module.scales, module.biases))
    return scales * numbers + biases


def make_linear(dtype: mx.Dtype, *, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(WIDTH, ROWS, bias=bias)
    mx.random.seed(0)
    linear.update({name: (mx.random.normal(own.shape) * 2).astype(dtype) for name, own in linear.items()})
    return linear


def make_hidden(dtype: mx.Dtype, rows: int = 3) -> mx.array:
    return mx.random.normal((rows, WIDTH), key=mx.random.key(1)).astype(dtype)


def check(module: nn.Module, hidden: mx.array, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
    found = Head()(module, hidden)
    assert found.dtype == mx.float32
    expected = as_float64(hidden) @ weight.T + (0.0 if bias is None else bias)
    assert np.abs(expected).max() > 64  # where bfloat16 goes in steps of a half
    np.testing.assert_allclose(np.array(found), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [*HALVES, mx.float32], ids=str)
@pytest.mark.parametrize("numbers_at_once", [WIDTH, 7 * WIDTH, 2**22])
def test_an_unquantized_head(dtype, numbers_at_once, monkeypatch):
    monkeypatch.setattr(module_under_test, "_NUMBERS_AT_ONCE", numbers_at_once)
    linear = make_linear(dtype)
    check(linear, make_hidden(dtype), as_float64(linear.weight))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head(dtype, bits):
    module = nn.QuantizedLinear.from_linear(make_linear(dtype), group_size=32, bits=bits)
    assert module.scales.dtype == dtype
    check(module, make_hidden(dtype), unpacked(module))


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_a_head_in_a_floating_point_format(mode):
    bits = 4 if mode == "mxfp4" else 8
    module = nn.QuantizedLinear.from_linear(make_linear(mx.bfloat16), group_size=32, bits=bits, mode=mode)
    weight = mx.dequantize(module.weight, module.scales, group_size=32, bits=bits, mode=mode)
    check(module, make_hidden(mx.bfloat16), as_float64(weight))  # bfloat16 holds these formats exactly


@pytest.mark.parametrize("bits", [None, 8])
def test_an_embedding_as_head(bits):
    embedding = nn.Embedding(ROWS, WIDTH)
    embedding.weight = make_linear(mx.bfloat16).weight
    if bits is None:
        check(embedding, make_hidden(mx.bfloat16), as_float64(embedding.weight))
        return
    packed = nn.QuantizedEmbedding.from_embedding(embedding, group_size=32, bits=bits)
    check(packed, make_hidden(mx.bfloat16), unpacked(packed))


def test_a_head_with_a_bias():
    linear = make_linear(mx.bfloat16, bias=True)
    check(linear, make_hidden(mx.bfloat16), as_float64(linear.weight), as_float64(linear.bias))


def test_an_adapter_on_the_head():
    from mlx_vlm.trainer.peft.lora_layers import LoRALinear

    linear = make_linear(mx.bfloat16)
    lora = LoRALinear.from_base(linear, r=2, scale=3.0)
    lora.lora_b = mx.random.normal(lora.lora_b.shape, key=mx.random.key(2))
    product = as_float64(lora.lora_a) @ as_float64(lora.lora_b)
    check(lora, make_hidden(mx.bfloat16), as_float64(linear.weight) + 3.0 * product.T)


def test_other_scales_are_noticed():
    head, hidden = Head(), make_hidden(mx.bfloat16)
    module = nn.QuantizedLinear.from_linear(make_linear(mx.bfloat16), group_size=32, bits=8)
    before = np.array(head(module, hidden))
    module.scales, module.biases = module.scales * 2, module.biases * 2
    np.testing.assert_allclose(np.array(head(module, hidden)), 2 * before, rtol=1e-5)
    head.release()
    np.testing.assert_allclose(np.array(head(module, hidden)), 2 * before, rtol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
def test_the_gradient_goes_through(bits, monkeypatch):
    monkeypatch.setattr(module_under_test, "_NUMBERS_AT_ONCE", 50 * WIDTH)
    linear = make_linear(mx.bfloat16)
    module = linear if bits is None else nn.QuantizedLinear.from_linear(linear, group_size=32, bits=bits)
    weight = as_float64(linear.weight) if bits is None else unpacked(module)
    slope = mx.random.normal((3, ROWS), key=mx.random.key(4))
    _, (found,) = mx.vjp(lambda x: [Head()(module, x)], [make_hidden(mx.bfloat16)], [slope])
    assert found.dtype == mx.bfloat16
    np.testing.assert_allclose(as_float64(found), np.array(slope) @ weight, rtol=2**-8, atol=0.2)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_log_probs_of_answers_are_those_of_the_last_hidden_state(family, tied, bits, tmp_path):
    """With weights in bfloat16, to float32's precision; the first token's and those decoded later."""
    model = load_model(checkpoints.write_checkpoint(tmp_path / "m", family, dtype="BF16", tied=tied))
    if bits is not None:
        nn.quantize(model.network.language_model, group_size=32, bits=bits)
    language = model.network.language_model
    part = language.model.embed_tokens if tied else language.lm_head
    weight = as_float64(part.weight) if bits is None else unpacked(part)
    seen: list[mx.array] = []
    whole = model.hidden

    def watch(*args, **kwargs):
        seen.append(whole(*args, **kwargs))
        return seen[-1]

    model.hidden = watch
    prompt = build_prompt(model.tokenizer, model.family, model.config, [], "What happens?")
    cache = model.make_cache()
    logits = prefill(model, prompt.ids, prompt.positions, cache)
    tokens = list(decode(model, logits, cache, prompt.next_position, max_tokens=6))
    for hidden, token in zip(seen, tokens):
        row = weight @ as_float64(hidden[0, -1])
        expected = row[token.id] - row.max() - np.log(np.exp(row - row.max()).sum())
        assert token.logprob == pytest.approx(expected, abs=2e-5)


def confidences(model: VideoModel, rows: list[dict], follow: list[list[int]] | None) -> tuple[list[list[int]], list]:
    """Confidence in each row's direct answer; `follow`: in these tokens."""
    answers, found = [], []
    for index, row in enumerate(rows):
        vision = load_vision(demo_folder() / row["video"], model.spec)
        prompt = build_prompt(
            model.tokenizer, model.family, model.config, [vision], row["question"], options=row["options"]
        )
        cache = model.make_cache()
        logits = prefill(
            model,
            prompt.ids,
            prompt.positions,
            cache,
            features=model.encode(prompt.media),
            media_mask=prompt.media_mask,
        )
        ids, logprobs = [], []
        for step in range(24 if follow is None else len(follow[index])):
            token = int(mx.argmax(logits)) if follow is None else follow[index][step]
            ids.append(token)
            logprobs.append(float(logits[token] - mx.logsumexp(logits)))
            if score_first_answer(ids, logprobs, model.tokenizer.decode) is not None:
                break
            place = mx.full((3, 1, 1), prompt.next_position + step, dtype=mx.int32)
            logits = model.logits(model.hidden(mx.array([[token]]), place, cache=cache)[:, -1])[0]
        answers.append(ids)
        found.append(score_first_answer(ids, logprobs, model.tokenizer.decode))
    return answers, [None if one is None else one.confidence for one in found]


@pytest.mark.slow
def test_confidence_of_the_bundled_checkpoint_is_that_of_float32_throughout():
    """The checkpoint is bfloat16. With a head in bfloat16 the largest difference is 0.011, and the mean 0.0016."""
    lines = (demo_folder() / "clips.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "qa"][1:12]
    folder: Path = demo_folder() / "checkpoint"
    answers, exact = confidences(load_model(folder, dtype="float32"), rows, None)
    _, shipped = confidences(load_model(folder), rows, answers)
    pairs = [(a, b) for a, b in zip(exact, shipped) if a is not None]
    assert len(pairs) >= 8
    assert np.mean([abs(a - b) for a, b in pairs]) < 0.0006
