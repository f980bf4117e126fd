r"""Bits where they matter: a precision for each module, so that a size is met with the least drift of confidence.

A source model reads probe prompts and writes a first answer to each. The log of its confidence, the mean log p that
`mlxvr.answering.confidence` defines, is a function z of every weight; to first order, rounding a matrix W to W + dW
moves it by g . dW, where g is the gradient of z. Roundings of single weights are close to independent, so the expected
square is

    cost(module, precision) = mean over probes of sum(g^2 * dW^2),

dW being what MLX's own rounding of W to that precision leaves behind. Costs of modules add up, and which precision each
module gets is a knapsack: the least sum of costs whose exact sizes, scales and biases included, fit.

What was tried: the bundled checkpoint with 3 bits in one of its 36 modules at a time, the root mean square drift over
69 held-out questions against the root of what is predicted. A knapsack adds costs up, so sizes count, not the order
alone. The first row is what is done here; the next are from the 28 questions of the bundled clips.

                                                  rank correlation    correlation    of logarithms
    mean log p, sum(g^2 dW^2), probes about clips       0.74             1.00            0.94
    mean log p, sum(g^2 dW^2)                           0.67             0.98            0.84
    mean log p, (g . dW)^2                              0.52             0.99            0.70
    confidence, sum(g^2 dW^2)                           0.66             0.94            0.78
    mean log-odds, sum(g^2 dW^2)                        0.74             0.81            0.81
    mlx-lm's alignment (3 against 8 bits)               0.31              -               -
    mean log p, sum(g^2 dW^2), all probes               0.55             0.45            0.48

Log-odds, whose gradient does not vanish where the model is certain, make far too little of the sensitive modules. The
square of a sum is what the probes at hand happen to say; the sum of squares holds for others. And probes that are not
what a model is for (texts and pictures, for one that was trained on clips) have gradients so large that they outvote
all the rest, so that only the bundled probes about clips are asked.

The gradients are computed layer by layer (see `layerwise`): one pass forward that keeps what goes into each layer, then
one backward, in which a layer is loaded, computed again and differentiated. So weights, gradients and squares of one
layer are in memory at a time, and a checkpoint of 17 GB is measured on a machine of 16 GB.

mlx-lm's dynamic quantization (`mlx_lm.quant.dynamic_quant`) is the known method: it aligns the gradient of KL, taken at
the low precision, with the difference between two precisions, and gives the higher one to all modules above a
threshold. The departures, and why: it holds the model twice and all gradients; it is driven by text, and what is
decided here is decided by the confidence of an answer about a picture; the alignment has a sign, so that errors cancel
in it that do not cancel on another prompt, where squares add up; and a threshold between two precisions leaves out all
others, and sizes. `tests/benchmarks/quantization.py` compares both.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxvr.checkpoint.defaults import Defaults
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.checkpoint.recipe import Precision, Recipe
from mlxvr.conversion.measure.first_answers import Draft, opening, write_answers
from mlxvr.conversion.measure.layerwise import Layer, LayerwiseModel, Track
from mlxvr.conversion.measure.probes import Probe, budgeted, build_prompts, bundled, load_media
from mlxvr.conversion.source import Checkpoint
from mlxvr.conversion.summary import format_bytes
from mlxvr.conversion.tensor_plan import DTYPE_CODES, make_plan, packed_tensors
from mlxvr.errors import ConfigError
from mlxvr.model.decode import suppression
from mlxvr.model.prompt import Prompt
from mlxvr.runtime import device_memory
from mlxvr.runtime.device_lock import use_device
from mlxvr.runtime.hooks import Progress, ShouldStop

__all__ = ["BITS", "GROUP_SIZES", "Candidate", "assign", "candidates", "choose_precisions", "clip_probes", "measure"]

BITS = (3, 4, 5, 6, 8)  # two bits change a layer too much for a first order to say how
GROUP_SIZES = (32, 64)
_MEMORY_SHARE = 0.4  # of the machine's memory, for weights
_UNITS = 1 << 16  # steps of size that the knapsack tells apart at most
_ROWS = 1 << 14  # rows of an embedding or head at a time
_EMBEDDING = "language_model.model.embed_tokens"
_HEAD = "language_model.lm_head"


@dataclass(frozen=True)
class Candidate:
    """A way to store a matrix (`precision` None: in the recipe's dtype) and the bytes that it takes."""

    precision: Precision | None
    nbytes: int


@dataclass(frozen=True, eq=False)
class _Answered:
    """A probe with its first answer: the prompt and all but the answer's last token, and where confidence lies.

    Attributes:
        prompt: its last token predicts the last of the answer.
        targets: the tokens that confidence is the mean of.
        first: place in the prompt whose logits are those of the first of them.
    """

    prompt: Prompt
    targets: tuple[int, ...]
    first: int


@use_device()
def choose_precisions(
    source: Path | Checkpoint,
    recipe: Recipe,
    *,
    target_bytes: int,
    probes: Sequence[Probe] | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[str, Precision | None]:
    """Choose how each matrix of a checkpoint is stored, so that the weights take at most `target_bytes` in all.

    Args:
        source: an unquantized folder, or one that was opened as a source.
        recipe: what it keeps stays unquantized, the bits of its rules are floors, and the group size of a rule holds;
            its own bits, group size and mode play no part. Matrices of the vision tower that it does not keep are
            stored as it says.
        target_bytes: of all tensors together.
        probes: what is asked; None: those of `mlxvr.conversion.measure.probes.bundled()` that are about a clip.
        memory_limit: bytes that weights may take while this is measured; None: 40% of the machine's memory.
        progress: called with ("sensitivity", layers done, layers in all).
        should_stop: asked between layers and tokens.

    Returns:
        Module -> precision for every matrix; None: kept in the recipe's dtype.

    Raises:
        ConfigError: the target is below what the lowest precisions take, or above the unquantized size; or there are
            no probes.
        CheckpointError: the source cannot be converted.
        Cancelled: `should_stop` said so.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    options = candidates(checkpoint, recipe)
    fixed = _fixed(checkpoint, recipe, options)
    usual = make_plan(checkpoint, fixed.get, recipe.quantization.dtype)
    rest = usual.nbytes - sum(_unquantized(one) for one in options.values())
    budget = target_bytes - rest
    _check_target(target_bytes, rest, options)
    asked = clip_probes() if probes is None else list(probes)
    if not asked:
        raise ConfigError("there are no probes to measure with: give at least one, or leave them out")
    costs = measure(
        checkpoint.folder, options, probes=asked, memory_limit=memory_limit, progress=progress, should_stop=should_stop
    )
    modules = list(options)
    picks = assign([[(one.nbytes, cost) for one, cost in zip(options[m], costs[m])] for m in modules], budget)
    chosen = {module: options[module][pick].precision for module, pick in zip(modules, picks, strict=True)}
    return {module: chosen.get(module, fixed.get(module)) for module in usual.stored}


def clip_probes() -> list[Probe]:
    """The bundled probes about a clip."""
    return [probe for probe in bundled() if isinstance(probe.source, str | Path)]


def candidates(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, tuple[Candidate, ...]]:
    """What each matrix of the language model may become under a recipe, smallest first; one that is kept has no entry.

    Bits start at what the recipe's rules ask for; a group size must divide the rows. The last is always unquantized.
    """
    quantization = recipe.quantization.changed(mode="affine", bits=BITS[0])
    code = DTYPE_CODES[quantization.dtype]
    found: dict[str, tuple[Candidate, ...]] = {}
    for tensor in checkpoint.tensors:
        if not tensor.is_matrix or checkpoint.folder.family.is_vision(tensor.key):
            continue
        floor = quantization.precision(tensor.module)
        if floor is None:
            continue
        named = [rule.group_size for rule in quantization.rules if fnmatchcase(tensor.module, rule.match)]
        sizes = [size for size in named if size is not None][-1:] or GROUP_SIZES
        precisions = [
            Precision(bits=bits, group_size=size)
            for bits in BITS
            if bits >= floor.bits
            for size in sizes
            if tensor.shape[1] % size == 0
        ]
        if precisions:
            stored = [(one, packed_tensors(tensor.key, tensor.shape, one, code)) for one in precisions]
            sized = [Candidate(one, sum(output.nbytes for output in outputs)) for one, outputs in stored]
            whole = Candidate(None, math.prod(tensor.shape) * (4 if code == "F32" else 2))
            found[tensor.module] = tuple(sorted([*sized, whole], key=lambda one: one.nbytes))
    return found


def assign(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """Pick one option of each item, so that sizes stay within a budget and the sum of costs is the least.

    A knapsack, solved by dynamic programming over sizes; exact where the sizes have a common divisor that is not too
    small, as those of a network's matrices have, else up to one part in 65,536 of the range of sizes. More budget never
    costs more.

    Args:
        options: for each item its options as (size, cost).
        budget: the largest sum of sizes.

    Returns:
        The index of each item's option. Raises `ValueError` when the smallest sizes do not fit.
    """
    smallest = [min(size for size, _ in item) for item in options]
    room = budget - sum(smallest)
    if room < 0:
        raise ValueError(f"the smallest sizes take {sum(smallest)}, the budget is {budget}")
    extra = [[size - least for size, _ in item] for item, least in zip(options, smallest)]
    span = sum(max(item) for item in extra)
    unit = math.gcd(*(size for item in extra for size in item)) or 1
    unit *= max(1, math.ceil(span / unit / _UNITS))
    places = min(room, span) // unit + 1
    best = np.zeros(places)
    picks = np.zeros((len(options), places), dtype=np.int16)
    for index, item in enumerate(options):
        found = np.full(places, np.inf)
        for option, (_, cost) in enumerate(item):
            step = -(-extra[index][option] // unit)
            if step >= places:
                continue
            reached = best[: places - step] + cost
            better = reached < found[step:]
            found[step:][better] = reached[better]
            picks[index, step:][better] = option
        best = found
    chosen, at = [0] * len(options), places - 1
    for index in reversed(range(len(options))):
        chosen[index] = int(picks[index, at])
        at -= -(-extra[index][chosen[index]] // unit)
    return chosen


@use_device()
def measure(
    folder: Path | ModelFolder,
    options: Mapping[str, Sequence[Candidate]],
    *,
    probes: Sequence[Probe],
    memory_limit: int | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[str, list[float]]:
    """Expected squared drift of log-confidence for each candidate of each module, from quantizing that module alone.

    The arguments are those of `choose_precisions`. All computing is done in float32.
    """
    limit = int(_MEMORY_SHARE * device_memory.physical_memory()) if memory_limit is None else memory_limit
    model = LayerwiseModel.open(folder, dtype="float32", memory_limit=limit)
    assert model.model.folder is not None, "made by load_model"
    defaults = Defaults.of(model.model.folder)
    media = load_media(probes, budgeted(defaults.spec), should_stop=should_stop)
    prompts = build_prompts(model.model, probes, media, system=defaults.system_prompt)
    answered = _answer(model, prompts, should_stop)
    backward = _Backward(model, answered, limit // 4, progress=progress, should_stop=should_stop)
    costs: dict[str, list[float]] = {}
    for module, weight, squares in backward.squares():
        if module in options:
            spent = [_spent(weight, squares, one.precision) for one in options[module]]
            before = costs.get(module, [0.0] * len(spent))  # an embedding comes in parts
            costs[module] = [old + new / len(answered) for old, new in zip(before, spent)]
    return costs


class _Backward:
    """Squared gradients of the answers' log-confidence, layer by layer."""

    def __init__(
        self,
        model: LayerwiseModel,
        answered: Sequence[_Answered],
        room: int,
        *,
        progress: Progress | None = None,
        should_stop: ShouldStop | None = None,
    ):
        """`room`: bytes from which on what goes into the layers is kept in bfloat16."""
        self._model = model
        self._answered = answered
        self._progress = progress
        self._should_stop = should_stop
        self._tracks = model.embed([one.prompt for one in answered], shared=False, should_stop=should_stop)
        tokens = sum(len(one.prompt.ids) for one in answered)
        width = self._tracks[0].pieces[0].hidden.shape[-1]
        fits = 4 * tokens * width * len(model.model.layers) <= room
        self._kept_as = mx.float32 if fits else mx.bfloat16

    def squares(self) -> Iterator[tuple[str, mx.array, mx.array]]:
        """Yield (module, weight, sum over answers of squared gradients) for each matrix of the language model.

        Embedding and head come last and in parts, some rows at a time.
        """
        inputs = self._forward()
        cotangents, head = self._ends()
        layers = self._model.layers(backwards=True, progress=self._tell, should_stop=self._should_stop)
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
        """Run all layers; what went into each, by layer and answer."""
        inputs = []
        for layer in self._model.layers(progress=self._tell, should_stop=self._should_stop):
            inputs.append([track.pieces[0].hidden.astype(self._kept_as) for track in self._tracks])
            for track in self._tracks:
                piece = track.pieces[0]
                piece.hidden = layer(piece.hidden, piece)
                mx.eval(piece.hidden)
            mx.eval(inputs[-1])
        return inputs

    def _ends(self) -> tuple[list[mx.array], list[tuple[mx.array, mx.array]]]:
        """Gradients of log-confidence where the last layer ends; for the head (cotangent of logits, its input)."""
        norm = self._model.model.network.language_model.model.norm
        cotangents, parts = [], []
        with self._model.head() as head:
            del head  # loads what is used below
            for track, one in zip(self._tracks, self._answered, strict=True):
                hidden = track.pieces[0].hidden
                rows = slice(one.first, one.first + len(one.targets))
                normed = norm(hidden[0, rows])
                logits = self._model.model.logits(normed)
                targets = mx.array(one.targets)
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
        """The embedding and the head, one matrix or two."""
        tied = bool(self._model.model.config["tie_word_embeddings"])
        if not tied:
            with self._model.head():
                weight = self._model.model.network.language_model.lm_head.weight
                yield from self._rows(_HEAD, weight, None, head)
        with _embedding(self._model) as weight:
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
                    at = np.flatnonzero(~piece.media_mask & (piece.ids >= start) & (piece.ids < start + _ROWS))
                    if len(at):
                        gradient = gradient.at[mx.array(piece.ids[at] - start)].add(cotangents[index][0, mx.array(at)])
                total = total + mx.square(gradient)
                mx.eval(total)
            yield module, rows, total

    def _tell(self, _: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress("sensitivity", done, total)


def log_confidence(logits: mx.array, targets: mx.array) -> mx.array:
    """Mean log p of the targets under float32 logits (tokens, vocab)."""
    taken = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (taken - mx.logsumexp(logits, axis=-1)).mean()


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


def _spent(weight: mx.array, squares: mx.array, precision: Precision | None) -> float:
    """sum(g^2 * dW^2) of a matrix, given the sum of g^2; quantized from bfloat16, as a conversion does."""
    if precision is None:
        return 0.0
    how: dict[str, Any] = {"group_size": precision.group_size, "bits": precision.bits, "mode": precision.mode}
    source = weight.astype(mx.bfloat16)
    error = mx.dequantize(*mx.quantize(source, **how), **how).astype(mx.float32) - weight
    return float((squares * mx.square(error)).sum().item())  # type: ignore[arg-type]


def _answer(model: LayerwiseModel, prompts: Sequence[Prompt], should_stop: ShouldStop | None) -> list[_Answered]:
    """Let the model write its first answers."""
    tracks, logits = model.read(prompts, should_stop=should_stop)
    never = suppression(model.model)
    drafts = [Draft(model.model.tokenizer, track, never, rows[-1]) for track, rows in zip(tracks, logits)]
    write_answers(model, drafts, should_stop=should_stop)
    return [_answered(draft) for draft in drafts]


def _answered(draft: Draft) -> _Answered:
    """A probe and the tokens of its confidence; all that was written where there is no box to be sure of."""
    prompt, tokens = draft.track.prompt, draft.tokens
    begun = len(opening(draft.tokenizer))
    start, end = (begun, len(tokens)) if draft.scored is None else draft.scored.token_span
    read = np.array(tokens[: end - 1], dtype=np.int32)
    at = prompt.next_position + np.arange(len(read), dtype=np.int32)
    whole = replace(
        prompt,
        ids=np.concatenate([prompt.ids, read]),
        positions=np.concatenate([prompt.positions, np.tile(at, (3, 1))], axis=1),
        media_mask=np.concatenate([prompt.media_mask, np.zeros(len(read), dtype=bool)]),
        next_position=prompt.next_position + len(read),
    )
    return _Answered(whole, tuple(tokens[start:end]), len(prompt.ids) + start - 1)


@contextmanager
def _embedding(model: LayerwiseModel) -> Iterator[mx.array]:
    with model._loaded(_EMBEDDING):
        yield model.model.network.language_model.model.embed_tokens.weight


def _matrices(module: nn.Module) -> dict[str, mx.array]:
    """Weights of a module's matrices by the path of what holds them."""
    flat = cast("list[tuple[str, mx.array]]", tree_flatten(module.parameters()))
    return {key.removesuffix(".weight"): one for key, one in flat if key.endswith(".weight") and one.ndim == 2}


def _fixed(checkpoint: Checkpoint, recipe: Recipe, options: Mapping[str, object]) -> dict[str, Precision | None]:
    """How the recipe stores the matrices that nothing is chosen for."""
    plan = make_plan(checkpoint, recipe.precision, recipe.quantization.dtype)
    return {module: None if module in options else one for module, one in plan.stored.items()}


def _unquantized(options: Sequence[Candidate]) -> int:
    return next(one.nbytes for one in options if one.precision is None)


def _check_target(target: int, rest: int, options: Mapping[str, Sequence[Candidate]]) -> None:
    least = rest + sum(one[0].nbytes for one in options.values())
    most = rest + sum(_unquantized(one) for one in options.values())
    if target < least:
        raise ConfigError(
            f"the target of {format_bytes(target)} is too small: at the fewest bits that are chosen from, the weights "
            f"take {format_bytes(least)}, {format_bytes(rest)} of it in what the recipe keeps"
        )
    if target > most:
        raise ConfigError(
            f"the target of {format_bytes(target)} is more than the unquantized weights take, {format_bytes(most)}: "
            "convert with --q-bits none, or give a smaller target"
        )
