"""Checks of logits: against transformers' in float32, for every way in which an answer may be computed here."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlxvr.diagnosis import reference
from mlxvr.diagnosis.findings import Finding, judge
from mlxvr.errors import ConfigError
from mlxvr.model.decode import prefill
from mlxvr.model.network import VideoModel
from mlxvr.model.prefix import Prefix
from mlxvr.model.prompt import Prompt, build_prompt

__all__ = ["check_chunks", "check_follow_up", "check_logits", "check_packing", "check_quantized_products"]

_TENSOR_CORES = "float32 products are rounded here (TF32 on NVIDIA cards): set MLX_ENABLE_TF32=0 for exact numbers"
_REPORT = "do not trust answers computed this way; please report it with this output"
_NO_KERNEL = dict.fromkeys(
    reference.MODELS,
    "this backend cannot quantize keys and values of a public model's heads: leave --kv-bits out",
) | {
    reference.BUNDLED: "this backend cannot quantize keys and values of heads of 32 numbers, as the demo has; public "
    f"models have 128: see the lines of {' and '.join(reference.MODELS[1:])}"
}
# (dtype, bits of the language model, bits of keys and values) -> largest error that is green, smallest that is red.
# On an x86 CPU, errors are at most 6e-7, 8e-3, 6e-4, 7e-7, 3e-3 and 5e-2; sums in another order need a margin.
_WAYS: dict[tuple[str, int | None, int | None], tuple[float, float]] = {
    ("float32", None, None): (1e-4, 2e-2),
    ("bfloat16", None, None): (3e-2, 1e-1),
    ("float16", None, None): (4e-3, 3e-2),
    ("float32", 4, None): (1e-4, 2e-2),
    ("float32", None, 8): (1e-2, 5e-2),
    ("float32", None, 4): (1.5e-1, 5e-1),
}


def check_logits() -> Iterator[Finding]:
    """Each model reads a clip and an image, and decodes the tokens of the committed answer step by step."""
    truth = reference.load()
    for (dtype, bits, kv_bits), (green, red) in _WAYS.items():
        way = dtype if bits is None else f"{bits} bits"
        if kv_bits is not None:
            way = f"keys and values in {kv_bits} bits"
        for name in reference.MODELS:
            model = reference.open_model(name, dtype=dtype)
            if bits is not None:
                reference.quantize(model)
            for shown in reference.SHOWN:
                check = f"logits, {name}, {shown}, {way}"
                expected = truth.arrays[f"{name}.{shown}.logits" + ("" if bits is None else f".{bits}bit")]
                answer = truth.arrays[f"{name}.{shown}.answer"]
                try:
                    logits = answer_logits(model, reference.prompt(model, shown), answer, kv_bits=kv_bits)
                except ConfigError as missing:
                    if kv_bits is None:
                        raise
                    yield Finding(
                        check=check,
                        status="yellow",
                        text=f"not available: {' '.join(str(missing).split())}",
                        advice=_NO_KERNEL[name],
                    )
                    continue
                advice = _TENSOR_CORES if (dtype, bits, kv_bits) == ("float32", None, None) else _REPORT
                error = relative_error(logits, expected)
                yield judge(check, error, green=green, red=red, what="relative error", advice=advice)


def check_chunks() -> Iterator[Finding]:
    """A prompt that is read in chunks gives the same logits as in one piece."""
    model = reference.open_model(reference.BUNDLED)
    asked = reference.prompt(model, "clip")
    token = np.zeros(1, dtype=np.int32)
    whole = answer_logits(model, asked, token)
    chunked = answer_logits(model, asked, token, step_size=37)
    error = relative_error(chunked, whole)
    yield judge("prefill in chunks", error, green=1e-4, red=2e-2, what="relative error", advice=_TENSOR_CORES)


def check_follow_up() -> Iterator[Finding]:
    """A follow-up question on a rewound cache gives the same bits as a first question."""
    model = reference.open_model(reference.BUNDLED, dtype="bfloat16")
    asked = reference.prompt(model, "clip")
    second = build_prompt(model.tokenizer, model.family, model.config, asked.media, "How does it move?")
    fresh, _ = Prefix.compute(model, asked)
    expected = np.array(fresh.extend(model, second))
    used, _ = Prefix.compute(model, asked)
    used.extend(model, asked)
    logits = np.array(used.extend(model, second))
    same = np.array_equal(logits, expected)
    error = 0.0 if same else relative_error(logits, expected)
    yield judge(
        "follow-up question = first question", error, green=0.0, red=1e-2, what="relative error", advice=_REPORT
    )


def check_quantized_products() -> Iterator[Finding]:
    """Products with packed weights at an 8B model's widths, against numpy's with the unpacked weights."""
    random = np.random.RandomState(5)
    for bits in (4, 8):
        worst, where = 0.0, ""
        for inner, outer in ((4096, 1024), (12288, 512)):
            weight = mx.array(random.normal(0.0, 0.02, (outer, inner)).astype(np.float32))
            packed, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
            unpacked = reference.unpack(np.array(packed), np.array(scales), np.array(biases), bits)
            for rows in (1, 2, 8, 65):
                inputs = random.normal(0.0, 1.0, (rows, inner)).astype(np.float32)
                product = mx.quantized_matmul(
                    mx.array(inputs), packed, scales, biases, transpose=True, group_size=64, bits=bits
                )
                error = relative_error(np.array(product), inputs @ unpacked.T)
                if not error <= worst:
                    worst, where = error, f" ({rows} rows, {inner} to {outer})"
        yield judge(
            f"products with {bits}-bit weights",
            worst,
            green=1e-4,
            red=2e-2,
            what=f"relative error{where}",
            advice=_REPORT,
        )


def check_packing() -> Iterator[Finding]:
    """Packing weights here loses no more than packing them by the definition."""
    weight = np.random.RandomState(9).normal(0.0, 0.02, (256, 4096)).astype(np.float32)
    lost = _lost(weight, *(np.array(part) for part in mx.quantize(mx.array(weight), group_size=64, bits=4)))
    by_definition = _lost(weight, *reference.pack(weight))
    yield judge(
        "packing to 4 bits",
        lost / by_definition - 1.0,
        green=5e-2,
        red=3e-1,
        what="loss beyond that of the definition",
        advice="checkpoints that are converted here are worse: convert them on another machine",
    )


def _lost(weight: np.ndarray, packed: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> float:
    return float(np.sqrt(np.mean((reference.unpack(packed, scales, biases, reference.BITS) - weight) ** 2)))


def answer_logits(
    model: VideoModel, asked: Prompt, answer: np.ndarray, *, kv_bits: int | None = None, step_size: int = 2048
) -> np.ndarray:
    """Logits of each token of an answer, decoded one by one after those before it: float32 (len(answer), vocab)."""
    cache = model.make_cache(kv_bits)
    logits = prefill(
        model,
        asked.ids,
        asked.positions,
        cache,
        features=model.encode(asked.media),
        media_mask=asked.media_mask,
        step_size=step_size,
    )
    rows = [np.array(logits)]
    for index, token in enumerate(answer[:-1].tolist()):
        place = mx.full((3, 1, 1), asked.next_position + index, dtype=mx.int32)
        hidden = model.hidden(mx.array([[token]], dtype=mx.int32), place, cache=cache)
        rows.append(np.array(model.logits(hidden[:, -1])[0].astype(mx.float32)))
    return np.stack(rows)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute difference, relative to the largest expected value; NaN if any number is NaN."""
    return float(np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max())
