"""KV caches: created, measured, rewound exactly, saved and loaded.

A cache is a list with one mlx-vlm `KVCache` (or `QuantizedKVCache`) per layer. It grows by 256 tokens at a time.
Rewinding is free: entries past the length are never read, and the next computation overwrites them. A rewound cache
therefore gives the same results bit for bit.

On disk a cache is one safetensors file with the arrays `0.keys.0`, `0.values.0`, .. (a quantized layer's packed words,
scales and biases are 0, 1 and 2), and with the layout and the caller's notes as metadata.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlxvr.errors import ConfigError
from mlxvr.storage.atomic import replacing

__all__ = ["CACHE_STEP", "KV_BITS", "group_size", "is_quantized", "length", "load", "make", "nbytes", "save", "trim"]

CACHE_STEP = 256  # tokens by which mlx-vlm's caches grow
KV_BITS = (2, 3, 4, 6, 8)
_GROUP_SIZES = (64, 32)
_LAYOUT = "mlxvr_cache"


def make(
    layers: int, *, head_dim: int, kv_bits: int | None = None, dtype: mx.Dtype = mx.float32, repeats: int = 1
) -> list[Any]:
    """An empty cache for a network.

    Args:
        layers: number of layers.
        head_dim: size of a head of keys or values; a quantized cache scales groups of at most 64 of its numbers.
        kv_bits: bits of each stored number; None: as computed.
        dtype: the network's dtype; backends have kernels for some dtypes only.
        repeats: number of query heads that share a head of keys and values; backends have kernels for some only.

    Raises `ConfigError` when keys and values cannot be stored in `kv_bits`.
    """
    from mlx_vlm.models.cache import KVCache, QuantizedKVCache

    if kv_bits is None:
        return [KVCache() for _ in range(layers)]
    if kv_bits not in KV_BITS:
        raise ConfigError(f"kv_bits {kv_bits!r} is not supported: use {', '.join(map(str, KV_BITS))}, or leave it out")
    size = group_size(head_dim, kv_bits)
    if not _has_kernels(head_dim, size, kv_bits, dtype, repeats):
        raise ConfigError(
            f"this backend has no kernel for keys and values of {kv_bits} bits in heads of {head_dim} numbers: leave "
            "kv_bits out"
        )
    return [QuantizedKVCache(group_size=size, bits=kv_bits) for _ in range(layers)]


def group_size(head_dim: int, kv_bits: int) -> int:
    """How many numbers of a key or value share a scale and a bias.

    Raises `ConfigError` when heads of this size cannot be stored in `kv_bits`.
    """
    size = next((size for size in _GROUP_SIZES if head_dim % size == 0), None)
    if size is None or head_dim * kv_bits % 32:
        raise ConfigError(
            f"kv_bits cannot be used with this model: its heads have {head_dim} numbers, not a multiple of 32"
        )
    return size


@functools.cache
def _has_kernels(head_dim: int, group_size: int, bits: int, dtype: mx.Dtype, repeats: int) -> bool:
    """Whether the backend multiplies with packed keys and values that are part of a longer buffer, as in a cache.

    MLX's CUDA backend (0.32.4) lacks the kernel for a prompt's queries where a head is one group, or where query heads
    share keys; it raises when the product is evaluated. So products of a prompt's size and of a token's are tried, in
    mlx-vlm's shapes.
    """
    size: dict[str, Any] = {"group_size": group_size, "bits": bits}
    heads = (1, 2) if repeats == 1 else (1, 2, 1)
    stored = mx.quantize(mx.zeros((*heads, 512, head_dim), dtype=dtype), **size)
    packed, scales, biases = (part[..., :384, :] for part in stored)
    try:
        for queries in (384, 1):
            shared = (1, 2) if repeats == 1 else (1, 2, repeats)
            query = mx.zeros((*shared, queries, head_dim), dtype=dtype)
            scores = mx.quantized_matmul(query, packed, scales, biases, transpose=True, **size)
            mx.eval(mx.quantized_matmul(scores, packed, scales, biases, transpose=False, **size))
    except (RuntimeError, ValueError):
        return False
    return True


def length(cache: Sequence[Any]) -> int:
    """Number of tokens in a cache."""
    return int(cache[0].offset)


def is_quantized(cache: Sequence[Any]) -> bool:
    """Whether keys and values are stored in fewer bits than they are computed in."""
    return _is_quantized(cache[0])


def trim(cache: Sequence[Any], to_length: int) -> None:
    """Drop all tokens after the first `to_length`; raises `ValueError` if the cache holds fewer."""
    held = length(cache)
    if not 0 <= to_length <= held:
        raise ValueError(f"cannot rewind a cache of {held} tokens to {to_length}")
    for layer in cache:
        layer.trim(held - to_length)


def nbytes(cache: Sequence[Any]) -> int:
    """Bytes that a cache has reserved."""
    return sum(int(layer.nbytes) for layer in cache if layer.keys is not None)


def save(cache: Sequence[Any], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a cache as safetensors, atomically: a stopped run leaves the old file or the new one.

    Args:
        cache: with at least one token.
        path: the file; its folder must exist.
        metadata: the caller's notes, which `load` returns.

    Raises `ConfigError` when the file cannot be written.
    """
    target = Path(path)
    arrays: dict[str, mx.array] = {}
    for index, layer in enumerate(cache):
        for kind, state in zip(("keys", "values"), _held(layer)):
            arrays |= {f"{index}.{kind}.{part}": array for part, array in enumerate(state)}
    quantized = [
        {"bits": layer.bits, "group_size": layer.group_size} if _is_quantized(layer) else {} for layer in cache
    ]
    notes = {**(metadata or {}), _LAYOUT: json.dumps(quantized)}
    try:
        with replacing(target, suffix=".safetensors") as temporary:  # MLX insists on the suffix
            mx.save_safetensors(str(temporary), arrays, notes)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"the cache cannot be written to {target}: {error}") from error


def load(path: str | os.PathLike[str]) -> tuple[list[Any], dict[str, str]]:
    """Read a file of `save`: the cache, evaluated, and the caller's notes.

    Raises `ConfigError` when the file cannot be read, is damaged or is no saved cache.
    """
    try:
        loaded = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, notes = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
        mx.eval(list(arrays.values()))  # now, so that an error names this file
        layout = notes.pop(_LAYOUT, None)
        if layout is None:
            raise ConfigError(f"{path} is a safetensors file but no saved cache: write one with Clip.save")
        return [_read_layer(arrays, index, layer) for index, layer in enumerate(json.loads(layout))], notes
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged, a part of the saved cache is missing ({error}): save it again"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read as a saved cache: {reason}") from error


def _read_layer(arrays: Mapping[str, mx.array], index: int, quantized: Mapping[str, int]) -> Any:
    """One layer's cache from the arrays of a file; `quantized` has its bits and group size, or is empty."""
    from mlx_vlm.models.cache import KVCache, QuantizedKVCache

    layer = QuantizedKVCache(**quantized) if quantized else KVCache()
    parts = 3 if quantized else 1
    keys, values = ([arrays[f"{index}.{kind}.{part}"] for part in range(parts)] for kind in ("keys", "values"))
    lengths = {array.shape[2] if array.ndim == 4 else -1 for array in (*keys, *values)}
    if len(lengths) > 1 or -1 in lengths:
        raise ValueError(f"the arrays of layer {index} do not fit each other")
    layer.keys, layer.values = (tuple(keys), tuple(values)) if quantized else (keys[0], values[0])
    layer.offset = keys[0].shape[2]
    return layer


def _is_quantized(layer: Any) -> bool:
    return hasattr(layer, "bits")


def _held(layer: Any) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
    """A layer's keys and values, without the reserved room."""
    keys, values = layer.state
    return (tuple(keys), tuple(values)) if _is_quantized(layer) else ((keys,), (values,))
