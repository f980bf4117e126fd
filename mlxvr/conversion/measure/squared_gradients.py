"""Squared gradients of the log-confidence of first answers, for each matrix of the language model, layer by layer.

One pass forward keeps the input of each layer; one pass backward loads each layer again, recomputes it and
differentiates it. Weights, gradients and squares of only one layer are in memory at a time, so a checkpoint of 17 GB is
measured on a machine of 16 GB.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxvr.conversion.measure.first_answers import Draft, opening, write_answers
from mlxvr.conversion.measure.layerwise import Layer, LayerwiseModel, Track
from mlxvr.model.decode import suppression
from mlxvr.model.prompt import Prompt
from mlxvr.runtime.hooks import Progress, ShouldStop

__all__ = ["AnsweredPrompt", "SquaredGradients", "answer_prompts", "log_confidence", "pull_back"]

_ROWS = 1 << 14  # rows of an embedding or head at a time
_EMBEDDING = "language_model.model.embed_tokens"
_HEAD = "language_model.lm_head"


@dataclass(frozen=True, eq=False)
class AnsweredPrompt:
    """A prompt with its first answer, and the tokens that the confidence is computed from.

    Attributes:
        prompt: the prompt and all tokens of the answer but the last, which its last token predicts.
        targets: the tokens whose mean log p is the log-confidence.
        first: index in the prompt of the token whose logits predict the first target.
    """

    prompt: Prompt
    targets: tuple[int, ...]
    first: int


def answer_prompts(
    model: LayerwiseModel, prompts: Sequence[Prompt], should_stop: ShouldStop | None
) -> list[AnsweredPrompt]:
    """Let the model write a first answer to each prompt."""
    tracks, logits = model.read(prompts, should_stop=should_stop)
    suppressed = suppression(model.model)
    drafts = [Draft(model.model.tokenizer, track, suppressed, rows[-1]) for track, rows in zip(tracks, logits)]
    write_answers(model, drafts, should_stop=should_stop)
    return [_answered(draft) for draft in drafts]


def _answered(draft: Draft) -> AnsweredPrompt:
    """A prompt with its answer, scored on the box's tokens; without a box that can be scored, on all written tokens."""
    prompt, tokens = draft.track.prompt, draft.tokens
    opening_tokens = len(opening(draft.tokenizer))
    start, end = (opening_tokens, len(tokens)) if draft.scored is None else draft.scored.token_span
    answer_ids = np.array(tokens[: end - 1], dtype=np.int32)
    positions = prompt.next_position + np.arange(len(answer_ids), dtype=np.int32)
    whole = replace(
        prompt,
        ids=np.concatenate([prompt.ids, answer_ids]),
        positions=np.concatenate([prompt.positions, np.tile(positions, (3, 1))], axis=1),
        media_mask=np.concatenate([prompt.media_mask, np.zeros(len(answer_ids), dtype=bool)]),
        next_position=prompt.next_position + len(answer_ids),
    )
    return AnsweredPrompt(whole, tuple(tokens[start:end]), len(prompt.ids) + start - 1)


class SquaredGradients:
    """Squared gradients of the answers' log-confidence; `squares` computes them."""

    def __init__(
        self,
        model: LayerwiseModel,
        answered: Sequence[AnsweredPrompt],
        room: int,
        *,
        progress: Progress | None = None,
        should_stop: ShouldStop | None = None,
    ):
        """`room`: if the inputs of all layers take more than these bytes in float32, they are stored in bfloat16."""
        self._model = model
        self._answered = answered
        self._progress = progress
        self._should_stop = should_stop
        self._tracks = model.embed([answer.prompt for answer in answered], shared=False, should_stop=should_stop)
        tokens = sum(len(answer.prompt.ids) for answer in answered)
        width = self._tracks[0].pieces[0].hidden.shape[-1]
        fits = 4 * tokens * width * len(model.model.layers) <= room
        self._inputs_dtype = mx.float32 if fits else mx.bfloat16

    def squares(self) -> Iterator[tuple[str, mx.array, mx.array]]:
        """Yield (module, weight, sum over answers of squared gradients) for each matrix of the language model.

        Embedding and head come last, a part of their rows at a time.
        """
        inputs = self._forward()
        cotangents, head = self._ends()
        layers = self._model.layers(backwards=True, progress=self._report, should_stop=self._should_stop)
        for layer in layers:
            sums: dict[str, mx.array] = {}
            hidden = inputs.pop()
            for index, track in enumerate(self._tracks):
                cotangents[index], gradients = pull_back(
                    layer, track, hidden[index].astype(mx.float32), cotangents[index]
                )
                for path, gradient in gradients.items():
                    sums[path] = sums[path] + mx.square(gradient) if path in sums else mx.square(gradient)
                mx.eval(cotangents[index], sums)
            weights = _matrices(layer.module)
            for path, total in sums.items():
                yield f"{layer.path}.{path}", weights[path], total
            mx.clear_cache()
        yield from self._vocabulary(cotangents, head)

    def _forward(self) -> list[list[mx.array]]:
        """Run all layers; return the input of each, by layer and answer."""
        inputs = []
        for layer in self._model.layers(progress=self._report, should_stop=self._should_stop):
            inputs.append([track.pieces[0].hidden.astype(self._inputs_dtype) for track in self._tracks])
            for track in self._tracks:
                piece = track.pieces[0]
                piece.hidden = layer(piece.hidden, piece)
                mx.eval(piece.hidden)
            mx.eval(inputs[-1])
        return inputs

    def _ends(self) -> tuple[list[mx.array], list[tuple[mx.array, mx.array]]]:
        """Gradients of log-confidence at the last layer's output, and for the head (cotangent of logits, its input)."""
        norm = self._model.model.network.language_model.model.norm
        cotangents, parts = [], []
        with self._model.head() as head:
            del head  # entering it loaded the weights that are used below
            for track, answer in zip(self._tracks, self._answered, strict=True):
                hidden = track.pieces[0].hidden
                rows = slice(answer.first, answer.first + len(answer.targets))
                normed = norm(hidden[0, rows])
                logits = self._model.model.logits(normed)
                targets = mx.array(answer.targets)
                _, (slope,) = mx.vjp(lambda x, y=targets: [log_confidence(x, y)], [logits], [mx.array(1.0)])
                _, (inner,) = mx.vjp(lambda x: [self._model.model.logits(norm(x))], [hidden[0, rows]], [slope])
                cotangent = mx.zeros_like(hidden)
                cotangent[0, rows] = inner
                mx.eval(cotangent, slope, normed)
                cotangents.append(cotangent)
                parts.append((slope, normed))
        return cotangents, parts

    def _vocabulary(
        self, cotangents: Sequence[mx.array], head: Sequence[tuple[mx.array, mx.array]]
    ) -> Iterator[tuple[str, mx.array, mx.array]]:
        """The embedding and the head: two matrices, or one if they are tied."""
        tied = bool(self._model.model.config["tie_word_embeddings"])
        if not tied:
            with self._model.head():
                weight = self._model.model.network.language_model.lm_head.weight
                yield from self._rows(_HEAD, weight, None, head)
        with self._model.embedding() as weight:
            yield from self._rows(_EMBEDDING, weight, cotangents, head if tied else None)

    def _rows(
        self,
        module: str,
        weight: mx.array,
        cotangents: Sequence[mx.array] | None,
        head: Sequence[tuple[mx.array, mx.array]] | None,
    ) -> Iterator[tuple[str, mx.array, mx.array]]:
        for start in range(0, weight.shape[0], _ROWS):
            rows = weight[start : start + _ROWS]
            total = mx.zeros(rows.shape)
            for index, track in enumerate(self._tracks):
                gradient = mx.zeros(rows.shape)
                if head is not None:
                    slope, normed = head[index]
                    gradient = slope[:, start : start + _ROWS].T @ normed
                if cotangents is not None:
                    piece = track.pieces[0]
                    tokens = np.flatnonzero(~piece.media_mask & (piece.ids >= start) & (piece.ids < start + _ROWS))
                    if len(tokens):
                        slopes = cotangents[index][0, mx.array(tokens)]
                        gradient = gradient.at[mx.array(piece.ids[tokens] - start)].add(slopes)
                total = total + mx.square(gradient)
                mx.eval(total)
            yield module, rows, total

    def _report(self, _: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress("mixed precision", done, total)


def log_confidence(logits: mx.array, targets: mx.array) -> mx.array:
    """Mean log p of the targets (tokens,) under float32 logits (tokens, vocab)."""
    target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (target_logits - mx.logsumexp(logits, axis=-1)).mean()


def pull_back(
    layer: Layer, track: Track, hidden: mx.array, cotangent: mx.array
) -> tuple[mx.array, dict[str, mx.array]]:
    """Differentiate a layer: the cotangent of its input, and the gradient of each of its matrices by path."""
    piece = track.pieces[0]
    weights = _matrices(layer.module)
    paths = list(weights)

    def run(x: mx.array, *values: mx.array) -> list[mx.array]:
        layer.module.load_weights([(f"{path}.weight", value) for path, value in zip(paths, values)], strict=False)
        return [layer(x, piece)]

    try:
        _, (inner, *gradients) = mx.vjp(run, [hidden, *weights.values()], [cotangent])
    finally:
        layer.module.load_weights([(f"{path}.weight", value) for path, value in weights.items()], strict=False)
    return inner, dict(zip(paths, gradients, strict=True))


def _matrices(module: nn.Module) -> dict[str, mx.array]:
    """The matrices among a module's weights, by the path of the submodule that holds each."""
    flat = cast("list[tuple[str, mx.array]]", tree_flatten(module.parameters()))
    return {key.removesuffix(".weight"): weight for key, weight in flat if key.endswith(".weight") and weight.ndim == 2}
