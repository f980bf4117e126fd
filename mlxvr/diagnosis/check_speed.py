"""Prediction of the seconds for a question about a clip, from a few random layers with an 8B model's widths.

Two layers of the language model and three blocks of the vision tower run at the true widths, on random weights (packed
to 4 bits in the language model). Their time is multiplied by the whole model's number of layers and blocks:

    prefill    layers * (a + b * tokens before)          decoding    layers * layer + head
    vision     depth * block + the rest of the tower

Small sizes are tried first, and larger ones only on a machine that is fast enough, so that the check also ends in time
on a slow one. Widths are those of Qwen3-VL-8B-Instruct's `config.json` (`reference/speed.json`).
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxvr.diagnosis.findings import Finding
from mlxvr.diagnosis.reference import FOLDER
from mlxvr.media import normalise
from mlxvr.model import cache as kv
from mlxvr.model.families.base import family_of
from mlxvr.model.memory_plan import PromptSize, plan_prompt
from mlxvr.model.vision_tower import run_tower
from mlxvr.runtime.device_memory import avoid_cpu_compiler, backend, usable_memory

__all__ = ["Prediction", "check_speed", "measure", "predict"]

# A public model: title, config.json, bytes of the whole model at 4 bits in groups of 64 (vision tower in 16 bits), and
# the changes for the measurement: the number of layers, and a vocabulary that takes no time to create.
_MODEL: dict[str, Any] = json.loads((FOLDER / "speed.json").read_text(encoding="utf-8"))
_WHOLE, _PART = _MODEL["config"], _MODEL["measured"]
TITLE = _MODEL["title"]
LAYERS, DEPTH = _WHOLE["text_config"]["num_hidden_layers"], _WHOLE["vision_config"]["depth"]
VOCABULARY, HIDDEN = _WHOLE["text_config"]["vocab_size"], _WHOLE["text_config"]["hidden_size"]
_MEASURED = _PART["text_config"]["num_hidden_layers"]  # layers of the language model
_BLOCKS = _PART["vision_config"]["depth"]  # of the vision tower; a run with one block shows the rest of the tower
_STEP = 2048  # tokens that go through the model at once, at most
_FRAMES, _ROW = 64, (20, 36)  # frames; patches of a temporal patch of two frames: 180 tokens
_TEXT_TOKENS, _ANSWER = 340, 8
_LOOKS = ((1, 4, 4), (1, 8, 8), (1, *_ROW), (8, *_ROW), (22, *_ROW))  # temporal patches, height, width; last: a chunk
_CONTEXT = 4096  # tokens in the cache when the cost of a context is measured
_PATIENCE = 120.0  # seconds to a direct answer beyond which a machine counts as slow
_ENOUGH = 2.0  # seconds; a size that would take longer is not tried

_Work = Callable[[], Sequence[mx.array]]
_Size = TypeVar("_Size", int, tuple[int, int, int])


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predicted cost of a question about 64 frames with the model `TITLE` at 4 bits.

    Attributes:
        prompt_tokens: tokens of the clip and the question.
        vision_seconds: seconds of the vision tower.
        prefill_seconds: seconds of the prompt's prefill.
        token_seconds: seconds of one decoded token.
        direct_seconds: seconds until the direct answer.
        peak_bytes: memory of the weights, plus the estimate of `mlxvr.model.memory_plan`.
    """

    prompt_tokens: int
    vision_seconds: float
    prefill_seconds: float
    token_seconds: float
    direct_seconds: float
    peak_bytes: float


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of the parts, each for one layer or block.

    Attributes:
        token: a prompt's token without context.
        context: extra seconds of a prompt's token for each token before it.
        step: one decoded token after 4,096 others.
        head: the output head for one token.
        patch: a patch in a block of the vision tower.
        around: a patch in the rest of the vision tower.
    """

    token: float
    context: float
    step: float
    head: float
    patch: float
    around: float


def check_speed() -> Iterator[Finding]:
    """Measure, predict, and compare the prediction with this machine's memory."""
    prediction = predict(measure())
    allowed = usable_memory()
    fits, quick = prediction.peak_bytes <= allowed, prediction.direct_seconds <= _PATIENCE
    text = (
        f"{_FRAMES} frames of {TITLE} at 4 bits: about {_seconds(prediction.direct_seconds)} to the direct answer "
        f"({_seconds(prediction.vision_seconds)} to look, {_seconds(prediction.prefill_seconds)} to read "
        f"{prediction.prompt_tokens:,} tokens), then {1 / prediction.token_seconds:.3g} tokens/s, "
        f"{prediction.peak_bytes / 1e9:.1f} GB"
    )
    advice = ""
    if not fits:
        advice = f"MLX may use {allowed / 1e9:.1f} GB here: use fewer frames, --kv-bits 8 or a smaller checkpoint"
    elif not quick:
        advice = "use fewer frames (--max-frames) or a smaller checkpoint here"
    yield Finding(
        check="speed",
        status="yellow" if advice else "green",
        text=text,
        measured=prediction.direct_seconds,
        limit=_PATIENCE,
        advice=advice,
    )


def predict(timings: Timings) -> Prediction:
    """The cost of a whole question from its parts, by the formula in the module's docstring."""
    rows = _FRAMES // 2
    patches = rows * _ROW[0] * _ROW[1]
    tokens = patches // 4 + _TEXT_TOKENS
    vision = (DEPTH * timings.patch + timings.around) * patches
    prefill = LAYERS * tokens * (timings.token + timings.context * tokens / 2) + timings.head
    token = LAYERS * timings.step + timings.head
    size = PromptSize(
        prompt_tokens=tokens,
        answer_tokens=_ANSWER,
        grids=[(rows, *_ROW)],
        step_size=_STEP,
        is_fused=backend() != "cpu",
    )
    memory = plan_prompt(_config(), size)
    return Prediction(
        prompt_tokens=tokens,
        vision_seconds=vision,
        prefill_seconds=prefill,
        token_seconds=token,
        direct_seconds=vision + prefill + _ANSWER * token,
        peak_bytes=_MODEL["weight_bytes"] + memory.peak,
    )


def measure() -> Timings:
    """Time the parts on this machine's default device."""
    avoid_cpu_compiler()
    network = _network()
    language = network.language_model.model
    dtype = language.layers[0].input_layernorm.weight.dtype
    size, seconds = _largest((8, 32, 128, 512, _STEP), lambda n: _read(language, n, dtype))
    cache = _filled(language, _CONTEXT, dtype)
    later = min(_timed(lambda: _step(language, size, _CONTEXT, cache, dtype)) for _ in range(2))
    step = _marginal(lambda count: _decode(language, count, cache, dtype))
    head = _head(dtype)
    hidden = mx.random.normal((1, HIDDEN)).astype(dtype)
    mx.eval(head.parameters(), hidden)
    logits = _marginal(lambda count: lambda: [head(hidden) for _ in range(count)])
    (rows, height, width), looked = _largest(_LOOKS, lambda size: _look(network.vision_tower, size, _BLOCKS))
    patches = rows * height * width
    alone = min(_timed(_look(network.vision_tower, (rows, height, width), 1)) for _ in range(2))
    block = max(0.0, looked - alone) / (_BLOCKS - 1) / patches
    return Timings(
        token=seconds / size / _MEASURED,
        context=max(0.0, later - seconds) / size / _CONTEXT / _MEASURED,
        step=step / _MEASURED,
        head=logits,
        patch=block,
        around=max(0.0, alone / patches - block),
    )


def _largest(sizes: Sequence[_Size], work: Callable[[_Size], _Work]) -> tuple[_Size, float]:
    """The largest size that the machine is fast enough for, and its seconds; a first run compiles kernels."""
    for size, larger in zip(sizes, (*sizes[1:], None)):
        run = work(size)
        seconds = min(_timed(run), _timed(run))
        if larger is None or seconds * float(np.prod(larger) / np.prod(size)) > _ENOUGH:
            return size, seconds
    raise ValueError("there are no sizes to try")


def _marginal(work: Callable[[int], _Work]) -> float:
    """Seconds of one more piece of work in a queue, where submitting and waiting happen once for all pieces."""
    pieces = 5
    single, all_of_them = (min(_timed(work(count)) for _ in range(3)) for count in (1, pieces))
    return max(0.0, all_of_them - single) / (pieces - 1)


def _timed(work: _Work) -> float:
    mx.synchronize()
    started = time.perf_counter()
    mx.eval(*work())
    mx.synchronize()
    return time.perf_counter() - started


def _read(language: Any, tokens: int, dtype: mx.Dtype) -> _Work:
    return lambda: _step(language, tokens, 0, kv.make(_MEASURED, head_dim=_WHOLE["text_config"]["head_dim"]), dtype)


def _decode(language: Any, count: int, cache: list[Any], dtype: mx.Dtype) -> _Work:
    """Pass one token through the measured layers `count` times in a row."""

    def work() -> Sequence[mx.array]:
        hidden = mx.full((1, 1, HIDDEN), 0.1, dtype=dtype)
        for _ in range(count):
            (hidden,) = _step(language, 1, _CONTEXT, cache, dtype, embeds=hidden)
        return [hidden]

    return work


def _filled(language: Any, tokens: int, dtype: mx.Dtype) -> list[Any]:
    """A cache that holds `tokens` random tokens."""
    text = _WHOLE["text_config"]
    shape = (1, text["num_key_value_heads"], tokens, text["head_dim"])
    cache = kv.make(_MEASURED, head_dim=text["head_dim"])
    for layer in cache:
        layer.update_and_fetch(*(mx.random.normal(shape).astype(dtype) for _ in range(2)))
    mx.eval([layer.state for layer in cache])
    return cache


def _step(
    language: Any, tokens: int, before: int, cache: list[Any], dtype: mx.Dtype, *, embeds: mx.array | None = None
) -> Sequence[mx.array]:
    """Run tokens through the layers after `before` others; the cache is then trimmed to its former length."""
    if embeds is None:
        embeds = mx.full((1, tokens, HIDDEN), 0.1, dtype=dtype)
    positions = mx.broadcast_to(mx.arange(before, before + tokens, dtype=mx.int32), (3, 1, tokens))
    ids = mx.zeros((1, tokens), dtype=mx.int32)
    out = language(ids, inputs_embeds=embeds, mask=None, cache=cache, position_ids=positions)
    for layer in cache:
        layer.trim(tokens)
    return [out]


def _look(tower: Any, size: tuple[int, int, int], blocks: int) -> _Work:
    """The first blocks of the vision tower; `size`: temporal patches, and their height and width in patches."""
    rows, height, width = size
    config = _config(**_PART)
    family = family_of(config)
    plan, spec = family.frame_plan(config, height, width), family.vision_spec(config)
    values = 3 * spec.temporal_patch_size * spec.patch_size**2
    patches = np.random.RandomState(0).randint(0, 256, (rows * height * width, values), dtype=np.uint8)

    def work() -> Sequence[mx.array]:
        whole = tower.blocks
        tower.blocks = whole[:blocks]
        try:
            embeds, levels = run_tower(tower, mx.array(normalise(patches, spec)), rows, plan)
        finally:
            tower.blocks = whole
        return [embeds, *levels]

    return work


def _config(**changes: Mapping[str, Any]) -> dict[str, Any]:
    """The whole model's config, with changes to its sections."""
    raw = {**_WHOLE, **{section: {**_WHOLE[section], **values} for section, values in changes.items()}}
    return family_of(raw).mlx_config(raw)


def _network() -> Any:
    """The network with two layers and three blocks; the language model's linear layers are packed to 4 bits."""
    config = _config(**_PART)
    family = family_of(config)
    network = family.build(config)
    dtype = mx.float32 if backend() == "cpu" else mx.bfloat16  # as the product does
    network.set_dtype(dtype)
    for layer in network.language_model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in list(block.children().items()):
                if isinstance(module, nn.Linear):
                    rows, columns = module.weight.shape
                    setattr(block, name, _packed(columns, rows, dtype))
    mx.eval(network.parameters())
    return network


def _packed(columns: int, rows: int, dtype: mx.Dtype) -> nn.QuantizedLinear:
    """A linear module of random 4-bit numbers; one block repeats, since creating them takes longer than using them."""
    module = nn.QuantizedLinear(columns, rows, bias=False, group_size=64, bits=4)
    block = np.random.RandomState(rows).randint(0, 2**32, (64, columns // 8), dtype=np.uint32)
    module.weight = mx.tile(mx.array(block), (-(-rows // 64), 1))[:rows]
    module.scales = mx.full((rows, columns // 64), 1e-3, dtype=dtype)
    module.biases = mx.full((rows, columns // 64), -8e-3, dtype=dtype)
    return module


def _head(dtype: mx.Dtype) -> nn.QuantizedLinear:
    return _packed(HIDDEN, VOCABULARY, dtype)


def _seconds(value: float) -> str:
    """A duration to read."""
    if value < 20:
        return f"{value:.1f} s"
    if value < 200:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.0f} h"
