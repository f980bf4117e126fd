"""One differentiable pass over a packed group: the log-prob of every token of every completion.

The layers' weights and parts are mlx-vlm's; what is done here instead of there is what decides time and memory:

- Attention goes block by block. A block of queries is scored against what it can see and nothing else: the prompt up
  to itself, or the prompt and its own completions. No N x N scores and no N x N mask exist, and the upper triangle is
  not computed.
- Attention keeps queries, keys and values, and is computed again in the backward pass. So where it is not fused the
  scores of one block of one layer are all that is in memory, for 5 to 13% more time of a whole gradient on a CPU.
- The head runs only where a token is predicted, some tokens at a time, and again in the backward pass: G * T rows of a
  vocabulary of 151,936 would be the largest array by far.
- With `checkpoint`, a layer keeps its input only and is computed again in the backward pass.

- No gradient goes through a gather. A GPU adds up the gradients of repeated rows in the order in which its threads
  arrive, so the sum's last bits would change from run to run. The prompt's last column, from which the first token of
  every completion is predicted, is sliced once and broadcast; MLX adds up the gradient of a broadcast in a fixed order.

`mx.checkpoint` differentiates its arguments alone and asks for the gradient of every one of them. So a layer's trained
parameters and its input are arguments, and positions and masks are not. MLX may compute independent arrays
side by side: each block is made to depend on the one before it (`mx.depends`), so that they take turns in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxvr.grpo.step.packing import PackedGroup
from mlxvr.model.families.base import Attend, Family
from mlxvr.model.network import VideoModel

__all__ = ["completion_logprobs", "queries_at_once", "targets_at_once"]

# Attention scores of one layer that may exist at once where attention is not fused (64 MiB in bfloat16).
SCORES_AT_ONCE = 2**25
# Queries of a block: fewer compute less of the upper triangle. 128 to 256 are fastest on a CPU, 1.5x faster than 1,024.
QUERIES_AT_ONCE = 256
# Logits that may exist at once (128 MiB in float32).
LOGITS_AT_ONCE = 2**25


def completion_logprobs(
    model: VideoModel,
    packed: PackedGroup,
    *,
    temperature: float = 1.0,
    checkpoint: bool = False,
    tokens_at_once: int | None = None,
) -> mx.array:
    """Log-probs of a group's tokens: log_softmax(logits / temperature) over the whole vocabulary.

    Args:
        model: differentiable in its trainable parameters, which must be the layers' own.
        packed: the group.
        temperature: that the completions were sampled at; 0 (greedy) counts as 1.
        checkpoint: keep less and compute more; the result does not change.
        tokens_at_once: of the head; bounds the memory; None: as many as fit into 128 MiB.

    Returns:
        float32 (G, T), 0 where padded; not yet evaluated.
    """
    hidden = model.embed(
        mx.array(packed.ids)[None], features=packed.features, media_mask=packed.media_mask[None]
    )  # (1, N, hidden)
    positions = mx.array(packed.positions)[:, None]
    attend = _make_attention(_blocks(packed, _heads(model)))
    levels = packed.features.deepstack if packed.features is not None else []
    is_media = mx.array(packed.media_mask)[:, None]  # (N, 1)
    row = mx.array(np.maximum(np.cumsum(packed.media_mask) - 1, 0).astype(np.int32))  # of the features, for each column
    for index, layer in enumerate(model.layers):
        hidden = _run_layer(model.family, layer, hidden, positions, attend, checkpoint=checkpoint)
        if index < len(levels):  # features are constants, so this gather has no gradient
            hidden = hidden + mx.where(is_media, levels[index][row], 0.0).astype(hidden.dtype)[None]
    if tokens_at_once is None:
        tokens_at_once = targets_at_once(int(model.config["text_config"]["vocab_size"]))
    score = _make_head(model, packed.targets[packed.mask], temperature or 1.0, tokens_at_once)
    return _pad(score(_predicting(hidden.squeeze(0), packed)), packed.mask.sum(axis=1))


def _predicting(hidden: mx.array, packed: PackedGroup) -> mx.array:
    """The hidden states (M, hidden) that predict the tokens of all completions, of those (N, hidden) of the columns.

    They are the columns `packed.columns[packed.mask]`, taken by slices.
    """
    last = hidden[packed.prompt_length - 1 : packed.prompt_length]
    pieces = []
    for start, stop in packed.spans:
        pieces += [last, hidden[start:stop]] if stop > start else [last]
    return mx.concatenate(pieces)


def _pad(values: mx.array, lengths: np.ndarray) -> mx.array:
    """Values (M,) of completions of these lengths, one after another -> (G, longest), 0 behind the shorter ones."""
    ends = np.cumsum(lengths)
    longest = int(lengths.max())
    pieces = [values[int(end - length) : int(end)] for end, length in zip(ends, lengths)]
    return mx.stack([mx.pad(piece, (0, longest - len(piece))) for piece in pieces])


@dataclass(frozen=True, eq=False)
class _Block:
    """Queries `start:stop`, which see the columns `:shared` and `own:stop`, as `mask` says.

    A "causal" mask is aligned at the lower right: the last query sees everything.
    """

    start: int
    stop: int
    shared: int
    own: int
    mask: mx.array | str

    def queries(self, array: mx.array) -> mx.array:
        """The block's part of (1, heads, N, head_dim)."""
        return array[:, :, self.start : self.stop]

    def keys(self, array: mx.array) -> mx.array:
        """The columns of (1, heads, N, head_dim) that the block sees."""
        if self.shared == self.own:
            return array[:, :, : self.stop]
        return mx.concatenate([array[:, :, : self.shared], array[:, :, self.own : self.stop]], axis=2)

    def add_keys(self, total: mx.array, part: mx.array) -> None:
        """Add `part`, which has the shape of `keys(total)`, to those columns of `total`, in place."""
        if self.shared == self.own:
            total[:, :, : self.stop] += part
            return
        total[:, :, : self.shared] += part[:, :, : self.shared]
        total[:, :, self.own : self.stop] += part[:, :, self.shared :]


def _blocks(packed: PackedGroup, heads: int) -> list[_Block]:
    """Cut a packed sequence so that no block has more queries or scores than may exist at once.

    Short completions share a block, which then needs a mask of its own size; a long one is a block or several.
    """
    prompt = packed.prompt_length
    blocks = [_Block(start, stop, 0, 0, "causal") for start, stop in _pieces(0, prompt, 0, heads)]
    together: list[tuple[int, int]] = []
    for first, last in packed.spans:
        if together and last - together[0][0] > queries_at_once(prompt + last - together[0][0], heads):
            blocks += _completion_blocks(together, packed, heads)
            together = []
        if last > first:
            together.append((first, last))
    if together:
        blocks += _completion_blocks(together, packed, heads)
    return blocks


def _completion_blocks(spans: Sequence[tuple[int, int]], packed: PackedGroup, heads: int) -> list[_Block]:
    """Blocks of adjacent completions: several completions share a block, a single one has one or more of its own."""
    prompt, first, last = packed.prompt_length, spans[0][0], spans[-1][1]
    if len(spans) == 1:
        return [_Block(start, stop, prompt, first, "causal") for start, stop in _pieces(first, last, prompt, heads)]
    owner, column = packed.owner[first:last], np.arange(first, last)
    own = (owner[:, None] == owner[None]) & (column[None] <= column[:, None])
    mask = np.concatenate([np.ones((last - first, prompt), dtype=bool), own], axis=1)
    return [_Block(first, last, prompt, first, mx.array(mask))]


def _pieces(start: int, stop: int, before: int, heads: int) -> list[tuple[int, int]]:
    """Cut a run of queries that sees `before` other columns."""
    edges = [*range(start, stop, queries_at_once(before + stop - start, heads)), stop]
    return list(pairwise(edges))


def queries_at_once(keys: int, heads: int) -> int:
    """How many queries of a block may see so many keys; at least one."""
    return max(1, min(QUERIES_AT_ONCE, SCORES_AT_ONCE // (heads * keys)))


def targets_at_once(vocabulary: int) -> int:
    """How many targets of a chunk may have logits; at least one."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def _make_attention(blocks: Sequence[_Block]) -> Attend:
    """Attention (1, heads, N, head_dim) over the blocks, which keeps nothing but queries, keys and values."""

    def attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        @mx.custom_function
        def attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
            done: list[mx.array] = []
            for block in blocks:
                parts = [block.queries(queries), block.keys(keys), block.keys(values)]
                done.append(_attend_block(block, scale, *_after(parts, done[-1:])))
            return mx.concatenate(done, axis=2)

        @attention.vjp
        def backward(
            primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
        ) -> tuple[mx.array, mx.array, mx.array]:
            queries, keys, values = primals
            to_queries: list[mx.array] = []
            to_keys, to_values = mx.zeros(keys.shape, mx.float32), mx.zeros(values.shape, mx.float32)
            for block in blocks:
                inputs = [block.queries(queries), block.keys(keys), block.keys(values), block.queries(cotangent)]
                inputs = _after(inputs, [*to_queries[-1:], to_keys, to_values])
                run = partial(_attend_block, block, scale)
                parts = mx.vjp(run, inputs[:3], inputs[3:])[1]
                to_queries.append(parts[0])
                block.add_keys(to_keys, parts[1])
                block.add_keys(to_values, parts[2])
            return mx.concatenate(to_queries, axis=2), to_keys.astype(keys.dtype), to_values.astype(values.dtype)

        return cast("mx.array", attention(queries, keys, values))

    return attend


def _after(arrays: list[mx.array], others: list[mx.array]) -> list[mx.array]:
    """The same arrays, computed after `others`."""
    return cast("list[mx.array]", mx.depends(arrays, others)) if others else arrays


def _attend_block(block: _Block, scale: float, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=block.mask)


def _heads(model: VideoModel) -> int:
    return int(model.config["text_config"]["num_attention_heads"])


def _run_layer(
    family: Family, layer: Any, hidden: mx.array, positions: mx.array, attend: Attend, *, checkpoint: bool
) -> mx.array:
    """One layer over (1, N, hidden)."""

    def run(parameters: Any, hidden: mx.array) -> mx.array:
        layer.update(parameters)
        hidden = hidden + family.attention(layer.self_attn, layer.input_layernorm(hidden), positions, attend)
        out: mx.array = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return out

    parameters = layer.trainable_parameters()
    if not checkpoint:
        return run(parameters, hidden)
    out = mx.checkpoint(run)(parameters, hidden)
    layer.update(parameters)  # not what the layer was last traced with
    return out


def _make_head(
    model: VideoModel, targets: np.ndarray, temperature: float, tokens_at_once: int
) -> Callable[[mx.array], mx.array]:
    """Hidden states (M, hidden) before the last normalisation -> log-probs of the targets, float32 (M,)."""
    edges = [*range(0, len(targets), tokens_at_once), len(targets)]
    chunks = [(slice(start, stop), mx.array(targets[start:stop])) for start, stop in pairwise(edges)]
    norm = model.network.language_model.model.norm

    def score(wanted: mx.array, rows: mx.array) -> mx.array:
        logits = model.logits(norm(rows)) / temperature
        return mx.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)

    @mx.custom_function
    def head(rows: mx.array) -> mx.array:
        done: list[mx.array] = []
        for where, wanted in chunks:
            (own,) = _after([rows[where]], done[-1:])
            done.append(score(wanted, own))
        return mx.concatenate(done)

    @head.vjp
    def backward(rows: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        done: list[mx.array] = []
        for where, wanted in chunks:
            inputs = _after([rows[where], cotangent[where]], done[-1:])
            (part,) = mx.vjp(partial(score, wanted), inputs[:1], inputs[1:])[1]
            done.append(part)
        return mx.concatenate(done)

    return cast("Callable[[mx.array], mx.array]", head)
