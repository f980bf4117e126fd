"""The bytes of each pass of a training step, as formulas over a workload.

Arrays were counted in the graph of each pass; the lists are in the functions. Outputs of queued operations are
allocated when they are queued, so the arrays of a part of a pass count as if none had been freed yet.
"""

import math

from mlxvr.grpo.memory.workload import LayerSizes, Workload
from mlxvr.grpo.step.forward import queries_at_once, targets_at_once
from mlxvr.model.memory_plan import cache_bytes, tower_bytes
from mlxvr.model.network import temporal_patches_at_once

__all__ = [
    "LORA_ITEMSIZE",
    "decode_pass",
    "group_cache",
    "head_pass",
    "layers_pass",
    "prefill_pass",
    "vision_pass",
]

LORA_ITEMSIZE = 4  # LoRA matrices and their products are float32
_QUEUED = 10  # operations that MLX submits to a device before it waits for one


def layers_pass(work: Workload, sizes: LayerSizes, levels: int) -> tuple[int, int, int]:
    """Bytes kept of all layers, bytes that the backward pass of one layer needs beside them, and its attention scores.

    Attention keeps its inputs and is computed again. Without checkpoints, the backward pass of the last layer begins
    when everything is kept. With them, each layer keeps its input; inputs are freed as gradients arrive, so that the
    larger of the two ends counts.

    Args:
        work: the workload.
        sizes: of the language model.
        levels: deepstack levels, whose features are kept too.
    """
    tokens = work.columns
    scores = 0 if work.backend == "cuda" else 6 * _largest_block(work, sizes.heads) * sizes.heads * work.itemsize
    whole = tokens * _kept_by_token(work, sizes)
    hidden = tokens * sizes.hidden * work.itemsize
    gradients = work.adapter_parameters * LORA_ITEMSIZE
    unpacked = _unpacked(work, sizes.inner * sizes.hidden, _QUEUED)
    backward = tokens * _backward_by_token(work, sizes)
    attention = scores + tokens * (4 * sizes.queries * work.itemsize + 8 * sizes.keys * 4)
    if not work.checkpoint:
        return sizes.layers * whole + levels * hidden, max(backward, attention) + unpacked, scores
    inputs = (sizes.layers + levels) * hidden
    again = whole - hidden + max(backward + tokens * _forward_by_token(work, sizes), attention)
    return max(inputs, gradients + hidden), again + unpacked, scores


def _kept_by_token(work: Workload, sizes: LayerSizes) -> int:
    """Bytes that a layer keeps of a token until its backward pass.

    - its input and the sum after attention, for the two norms: 2 hidden
    - the inputs of modules with LoRA, for the gradients of their matrices: each distinct array once if it already is
      float32, else a float32 copy for each module
    - queries and keys before the norms of the heads, if there are any
    - queries, keys and values as attention takes them
    - gate, up, sigmoid(gate), and the product of gate and sigmoid: 4 inner
    - the products of LoRA's first matrices: the rank for each module
    """
    item = work.itemsize
    numbers = 2 * sizes.hidden + sizes.queries + 2 * sizes.keys + 4 * sizes.inner
    if sizes.head_norms:
        numbers += sizes.queries + sizes.keys
    return numbers * item + _lora_inputs(work, sizes) + work.rank * len(work.target_modules) * LORA_ITEMSIZE


def _lora_inputs(work: Workload, sizes: LayerSizes) -> int:
    """Bytes of the kept inputs of modules with LoRA, of a token."""
    shapes = sizes.shapes()
    if work.itemsize < LORA_ITEMSIZE:
        return sum(shapes[module][0] for module in work.target_modules) * LORA_ITEMSIZE
    shared_inputs = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    return sum(shapes[names[0]][0] for names in shared_inputs if set(names) & set(work.target_modules)) * work.itemsize


def _backward_by_token(work: Workload, sizes: LayerSizes) -> int:
    """Bytes that the backward pass of the MLP and its norm allocates for a token; none is freed yet.

    Of the MLP's width: the gradients of the product, of gate, up and sigmoid, and two steps to that of sigmoid. Of the
    hidden width: the gradients through gate and up, by weight and by LoRA, and five arrays of the norm.
    """
    item = work.itemsize
    adapted = work.gate_and_up_adapted
    cast = 0 if item == LORA_ITEMSIZE else LORA_ITEMSIZE + item
    return 6 * sizes.inner * item + sizes.hidden * (7 * item + adapted * (LORA_ITEMSIZE + cast))


def _forward_by_token(work: Workload, sizes: LayerSizes) -> int:
    """Bytes that a layer's forward pass allocates for a token beside what it keeps; none is freed yet.

    For each module with LoRA: the output of the weight, the output of LoRA, and the latter scaled.
    """
    shapes = sizes.shapes()
    return sum(shapes[module][1] for module in work.target_modules) * (work.itemsize + 2 * LORA_ITEMSIZE)


def _largest_block(work: Workload, heads: int) -> int:
    """Attention scores of a head in the largest block of queries.

    The prompt is cut into blocks of queries, which see everything before them; short completions share a block.
    """
    prompt, own = work.prompt_tokens, work.completion_tokens - 1
    size = queries_at_once(prompt + max(own, 1), heads)
    block = min(size, prompt) * prompt
    if own * 2 > size:  # each completion alone
        return max(block, min(size, own) * (prompt + own))
    together = min(work.group_size, size // own) if own > 0 else 0
    return max(block, together * own * (prompt + together * own))


def head_pass(work: Workload, sizes: LayerSizes) -> int:
    """Bytes of the logits: two float32 arrays of a chunk, and a third from four chunks on.

    The arrays of the last layer's forward pass are not freed yet.
    """
    targets = work.group_size * work.completion_tokens
    chunk = min(targets, targets_at_once(sizes.vocabulary))
    chunks = math.ceil(targets / chunk)
    arrays = (2 if chunks < 4 else 3) * LORA_ITEMSIZE + (0 if work.itemsize == LORA_ITEMSIZE else work.itemsize)
    unpacked = _unpacked(work, sizes.vocabulary * sizes.hidden, chunks)
    return chunk * sizes.vocabulary * arrays + work.columns * _forward_by_token(work, sizes) + unpacked


def _unpacked(work: Workload, numbers: int, products: int) -> int:
    """Bytes of the weights that CUDA unpacks for products of many rows; as many products as are queued hold them."""
    if work.backend != "cuda" or not work.quantized:
        return 0
    return min(products, _QUEUED) * numbers * work.itemsize


def group_cache(work: Workload, sizes: LayerSizes) -> int:
    """Bytes of keys and values of a group's tree; the layer that grows holds its old arrays too."""
    cache = cache_bytes(
        work.config, work.prompt_tokens + work.group_size * work.completion_tokens, itemsize=work.itemsize
    )
    return cache + cache // sizes.layers


def prefill_pass(work: Workload, sizes: LayerSizes) -> int:
    """Bytes of a prefill step in a layer's MLP, none freed yet, and of attention scores where attention is not fused.

    Gate, up, sigmoid and product, the outputs of LoRA for gate and up; the residual, its norm, and the MLP's output.
    """
    step = min(work.prompt_tokens, work.prefill_step)
    adapted = work.gate_and_up_adapted
    mlp = sizes.inner * (4 * work.itemsize + adapted * LORA_ITEMSIZE) + 7 * sizes.hidden * work.itemsize
    whole, rest = divmod(work.prompt_tokens, step)
    seen = max(step * whole * step, rest * work.prompt_tokens)
    scores = sizes.heads * seen * work.itemsize if work.backend == "cpu" else 0
    return step * mlp + scores


def decode_pass(work: Workload, sizes: LayerSizes) -> int:
    """Bytes of a decoding step of all completions: logits, and the arrays that tokens are drawn from."""
    seen = work.prompt_tokens + work.group_size * work.completion_tokens
    scores = 2 * sizes.heads * work.group_size * seen * work.itemsize
    return 6 * work.group_size * sizes.vocabulary * LORA_ITEMSIZE + scores


def vision_pass(work: Workload) -> int:
    """Bytes of the vision tower over as many temporal patches of a clip as it takes at once."""
    if work.visual_tokens == 0:
        return 0
    vision = work.config["vision_config"]
    merge = int(vision["spatial_merge_size"]) ** 2
    frame = min(work.frame_tokens, work.visual_tokens) * merge
    patches = min(temporal_patches_at_once(vision, frame) * frame, work.visual_tokens * merge)
    return tower_bytes(vision, patches, frame, itemsize=work.itemsize, is_fused=work.backend != "cpu")
