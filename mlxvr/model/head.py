"""The output head: from hidden states to float32 logits, whatever the network's dtype.

A network in bfloat16 would give logits with 8 significant bits. Between 16 and 32 these are 0.125 apart, so that an
answer of two tokens can only have the confidences .9669, .9707, .9740 around a threshold of .97. On the bundled
checkpoint the float32 head brings confidences eight times closer to those of a network that is float32 throughout (mean
difference 0.0002 instead of 0.0016). The weights stay as they are stored, but products are computed in float32:

- A quantized head multiplies packed weights with float32 activations. MLX then computes in float32, and also needs
  scales and biases in float32: they are converted once (78 MB more than in bfloat16 for 151,936 x 4,096 in groups of
  64).
- MLX has no product of bfloat16 weights that returns float32, and a float32 copy would take twice the head's memory. So
  an unquantized head is converted and multiplied some rows at a time: this is exact, but each token moves five times
  the bytes. `python -m tests.benchmarks.head` measures both.
"""

from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

__all__ = ["Head"]

_NUMBERS_AT_ONCE = 2**22  # of an unquantized head in float32 (16 MiB): fits into a processor's cache, which is fastest


class Head:
    """Applies an output head in float32; keeps the converted scales and biases."""

    def __init__(self) -> None:
        self._stored: mx.array | None = None  # the head's own scales, when `_scales` and `_biases` were converted
        self._scales: mx.array | None = None
        self._biases: mx.array | None = None

    def __call__(self, module: nn.Module, hidden: mx.array) -> mx.array:
        """Multiply hidden states with the rows of the head.

        Args:
            module: `nn.Linear`, or the `nn.Embedding` of a tied head; quantized or not, with adapters or not.
            hidden: (.., hidden), any float dtype.

        Returns:
            (.., vocab), float32, not yet evaluated.
        """
        wide = hidden.astype(mx.float32)
        if type(module) in (nn.QuantizedLinear, nn.QuantizedEmbedding):
            out = self._multiply_packed(module, wide)
        elif type(module) in (nn.Linear, nn.Embedding):
            out = _multiply(module["weight"], wide)
        else:  # an adapter on the head: its layer itself computes in float32
            return cast("mx.array", module(wide)).astype(mx.float32)
        return out + module["bias"].astype(mx.float32) if "bias" in module else out

    def release(self) -> None:
        """Drop the converted scales, for callers who unload the head between calls."""
        self._stored = self._scales = self._biases = None

    def _multiply_packed(self, module: Any, wide: mx.array) -> mx.array:
        scales, biases = module["scales"], module.get("biases")
        if scales.dtype not in (mx.float32, mx.uint8):  # uint8: MLX's floating-point formats
            if self._stored is not scales:
                self._stored, self._scales = scales, scales.astype(mx.float32)
                self._biases = None if biases is None else biases.astype(mx.float32)
                mx.eval(self._scales, *([] if self._biases is None else [self._biases]))
            scales, biases = self._scales, self._biases
        return mx.quantized_matmul(
            wide,
            module["weight"],
            scales=scales,
            biases=biases,
            transpose=True,
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        )


def _multiply(weight: mx.array, wide: mx.array) -> mx.array:
    """`wide @ weight.T` in float32; only some rows of the weight are float32 at a time."""
    if weight.dtype == mx.float32:
        return wide @ weight.T
    rows, width = weight.shape
    edges = [*range(0, rows, max(1, _NUMBERS_AT_ONCE // width)), rows]
    done: list[mx.array] = []
    for start, stop in pairwise(edges):
        part = weight[start:stop]
        if done:  # part after part; `stop_gradient` keeps the weight independent of the differentiated input
            (part,) = cast("list[mx.array]", mx.depends([part], [mx.stop_gradient(done[-1])]))
        done.append(wide @ part.astype(mx.float32).T)
    return mx.concatenate(done, axis=-1)
