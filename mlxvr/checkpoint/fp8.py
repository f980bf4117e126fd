"""Weights in blocks of 8-bit floats (E4M3), the format of some releases by DeepSeek and Qwen.

Each block of rows and columns shares a scale, `<weight>_scale_inv`; `quantization_config.weight_block_size` in
config.json is the size of a block. transformers calls the format finegrained fp8.
"""

import mlx.core as mx

__all__ = ["unpack_fp8"]


def unpack_fp8(weight: mx.array, scales: mx.array, block: tuple[int, int]) -> mx.array:
    """Return a weight's float32 numbers (rows, columns), not yet evaluated.

    Args:
        weight: uint8 (rows, columns), the bits of E4M3 numbers.
        scales: (rows / block rows, columns / block columns), rounded up.
        block: rows and columns that share a scale.
    """
    rows, columns = weight.shape
    spread = mx.repeat(mx.repeat(scales.astype(mx.float32), block[0], axis=0)[:rows], block[1], axis=1)[:, :columns]
    numbers: mx.array = mx.from_fp8(weight, dtype=mx.float32)
    return numbers * spread
