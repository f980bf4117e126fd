r"""Mixed precision: a precision for each module, so that a size is met with the least drift of confidence.

A source model reads probe prompts and writes a first answer to each. The log of its confidence, the mean log p that
`mlxvr.answering.confidence` defines, is a function z of every weight. To first order, rounding a matrix W to W + dW
moves z by g . dW, where g is the gradient of z. The rounding errors of single weights are close to independent, so the
expected square of the move is

    cost(module, precision) = mean over probes of sum(g^2 * dW^2),

where dW is the error of MLX's own rounding of W to that precision. Costs of modules add up, and the choice of
precisions is a knapsack: the least sum of costs whose exact sizes, scales and biases included, fit.

Variants were compared on the bundled checkpoint, with 3 bits in one of its 36 modules at a time: the root mean square
drift over 69 held-out questions against the root of the predicted cost. A knapsack adds costs up, so their sizes
matter, not only their order. The first row is the method used here; the next rows are from the 28 questions of the
bundled clips.

                                                  rank correlation    correlation    of logarithms
    mean log p, sum(g^2 dW^2), probes about clips       0.74             1.00            0.94
    mean log p, sum(g^2 dW^2)                           0.67             0.98            0.84
    mean log p, (g . dW)^2                              0.52             0.99            0.70
    confidence, sum(g^2 dW^2)                           0.66             0.94            0.78
    mean log-odds, sum(g^2 dW^2)                        0.74             0.81            0.81
    mlx-lm's alignment (3 against 8 bits)               0.31              -               -
    mean log p, sum(g^2 dW^2), all probes               0.55             0.45            0.48

Log-odds, whose gradient does not vanish where the model is certain, underestimate the sensitive modules by far. The
square of a sum only fits the probes at hand; the sum of squares also holds for other prompts. Probes outside a model's
purpose (texts and pictures, for a model that was trained on clips) have gradients so large that they outweigh all
others, so only the bundled probes about clips are used.

`squared_gradients` computes the gradients layer by layer, so a checkpoint of 17 GB is measured on a machine of 16 GB.

The known method is mlx-lm's dynamic quantization (`mlx_lm.quant.dynamic_quant`): it aligns the gradient of KL, taken at
the low precision, with the difference between two precisions, and gives the higher precision to all modules above a
threshold. We depart from it for four reasons. It holds the model twice, and all gradients. It is driven by text, while
the exit is decided by the confidence of an answer about a picture. Its alignment has a sign, so errors cancel that do
not cancel on another prompt; squares add up. And a threshold between two precisions ignores all other precisions and
the modules' sizes. `tests/benchmarks/quantization.py` compares both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxvr.checkpoint.defaults import Defaults
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.checkpoint.recipe import Precision, Recipe
from mlxvr.conversion.measure.knapsack import assign
from mlxvr.conversion.measure.layerwise import LayerwiseModel, default_weights_limit
from mlxvr.conversion.measure.probes import Probe, budgeted, build_prompts, bundled, load_media
from mlxvr.conversion.measure.squared_gradients import SquaredGradients, answer_prompts
from mlxvr.conversion.source import Checkpoint
from mlxvr.conversion.summary import format_bytes
from mlxvr.conversion.tensor_plan import DTYPE_CODES, make_plan, packed_tensors
from mlxvr.errors import ConfigError
from mlxvr.runtime.device_lock import use_device
from mlxvr.runtime.hooks import NO_HOOKS, Hooks

__all__ = ["BITS", "GROUP_SIZES", "Candidate", "candidates", "choose_precisions", "clip_probes", "measure"]

BITS = (3, 4, 5, 6, 8)  # two bits change a layer too much for a first-order estimate
GROUP_SIZES = (32, 64)


@dataclass(frozen=True)
class Candidate:
    """A precision for a matrix (None: unquantized, in the recipe's dtype) and the bytes that the matrix then takes."""

    precision: Precision | None
    nbytes: int


@use_device()
def choose_precisions(
    source: Path | Checkpoint,
    recipe: Recipe,
    *,
    target_bytes: int,
    probes: Sequence[Probe] | None = None,
    memory_limit: int | None = None,
    hooks: Hooks = NO_HOOKS,
) -> dict[str, Precision | None]:
    """Choose a precision for each matrix of a checkpoint, so that all weights take at most `target_bytes`.

    Args:
        source: an unquantized folder, or one that was opened as a source.
        recipe: its kept modules stay unquantized, the bits of its rules are lower bounds, and a rule's group size is
            used; its own bits, group size and mode are ignored. It decides the precision of matrices of the vision
            tower that it does not keep.
        target_bytes: of all tensors together.
        probes: questions to measure with; None: those of `mlxvr.conversion.measure.probes.bundled()` about a clip.
        memory_limit: bytes that weights may take during the measurement; None: `layerwise.default_weights_limit()`.
        hooks: progress is called with ("mixed precision", layers done, layers in all), should_stop between layers and
            tokens.

    Returns:
        Module -> precision for every matrix; None: unquantized, in the recipe's dtype.

    Raises:
        ConfigError: the target is below the size at the lowest precisions, or above the unquantized size; or there are
            no probes.
        CheckpointError: the source cannot be converted.
        Cancelled: `hooks.should_stop` returned True.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    options = candidates(checkpoint, recipe)
    fixed = _fixed(checkpoint, recipe, options)
    usual = make_plan(checkpoint, fixed.get, recipe.quantization.dtype)
    rest = usual.nbytes - sum(_unquantized(choices) for choices in options.values())
    budget = target_bytes - rest
    _check_target(target_bytes, rest, options)
    asked = clip_probes() if probes is None else list(probes)
    if not asked:
        raise ConfigError("there are no probes to measure with: give at least one, or leave `probes` out")
    costs = measure(checkpoint.folder, options, probes=asked, memory_limit=memory_limit, hooks=hooks)
    modules = list(options)
    items = [[(option.nbytes, cost) for option, cost in zip(options[m], costs[m])] for m in modules]
    picks = assign(items, budget)
    chosen = {module: options[module][pick].precision for module, pick in zip(modules, picks, strict=True)}
    return {module: chosen.get(module, fixed.get(module)) for module in usual.stored}


def clip_probes() -> list[Probe]:
    """The bundled probes about a clip."""
    return [probe for probe in bundled() if isinstance(probe.source, str | Path)]


def candidates(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, tuple[Candidate, ...]]:
    """The candidates of each matrix of the language model under a recipe, smallest first; kept matrices have no entry.

    Bits start at the recipe's rules; a group size must divide the rows. The last candidate is always unquantized.
    """
    quantization = recipe.quantization.changed(mode="affine", bits=BITS[0])
    code = DTYPE_CODES[quantization.dtype]
    result: dict[str, tuple[Candidate, ...]] = {}
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
            outputs = [packed_tensors(tensor.key, tensor.shape, precision, code) for precision in precisions]
            sizes_of = [sum(output.nbytes for output in packed) for packed in outputs]
            quantized = [Candidate(precision, nbytes) for precision, nbytes in zip(precisions, sizes_of)]
            whole = Candidate(None, math.prod(tensor.shape) * (4 if code == "F32" else 2))
            result[tensor.module] = tuple(sorted([*quantized, whole], key=lambda candidate: candidate.nbytes))
    return result


@use_device()
def measure(
    folder: Path | ModelFolder,
    options: Mapping[str, Sequence[Candidate]],
    *,
    probes: Sequence[Probe],
    memory_limit: int | None = None,
    hooks: Hooks = NO_HOOKS,
) -> dict[str, list[float]]:
    """Expected squared drift of log-confidence when one module alone is quantized, for each candidate of each module.

    The arguments are those of `choose_precisions`. Everything is computed in float32.
    """
    limit = default_weights_limit() if memory_limit is None else memory_limit
    model = LayerwiseModel.open(folder, dtype="float32", memory_limit=limit)
    assert model.model.folder is not None, "made by load_model"
    defaults = Defaults.of(model.model.folder)
    media = load_media(probes, budgeted(defaults.spec), should_stop=hooks.should_stop)
    prompts = build_prompts(model.model, probes, media, system=defaults.system_prompt)
    answered = answer_prompts(model, prompts, hooks.should_stop)
    gradients = SquaredGradients(model, answered, limit // 4, progress=hooks.progress, should_stop=hooks.should_stop)
    costs: dict[str, list[float]] = {}
    for module, weight, squares in gradients.squares():
        if module in options:
            added = [_rounding_cost(weight, squares, option.precision) for option in options[module]]
            before = costs.get(module, [0.0] * len(added))  # an embedding comes in parts
            costs[module] = [old + new / len(answered) for old, new in zip(before, added)]
    return costs


def _rounding_cost(weight: mx.array, squares: mx.array, precision: Precision | None) -> float:
    """sum(g^2 * dW^2) of a matrix, where `squares` is g^2; it is quantized from bfloat16, as in a conversion."""
    if precision is None:
        return 0.0
    how: dict[str, Any] = {"group_size": precision.group_size, "bits": precision.bits, "mode": precision.mode}
    source = weight.astype(mx.bfloat16)
    error = mx.dequantize(*mx.quantize(source, **how), **how).astype(mx.float32) - weight
    return float((squares * mx.square(error)).sum().item())  # type: ignore[arg-type]


def _fixed(checkpoint: Checkpoint, recipe: Recipe, options: Mapping[str, object]) -> dict[str, Precision | None]:
    """The recipe's precision of the matrices that have no candidates."""
    plan = make_plan(checkpoint, recipe.precision, recipe.quantization.dtype)
    return {module: None if module in options else precision for module, precision in plan.stored.items()}


def _unquantized(choices: Sequence[Candidate]) -> int:
    return next(candidate.nbytes for candidate in choices if candidate.precision is None)


def _check_target(target: int, rest: int, options: Mapping[str, Sequence[Candidate]]) -> None:
    least = rest + sum(choices[0].nbytes for choices in options.values())
    most = rest + sum(_unquantized(choices) for choices in options.values())
    if target < least:
        raise ConfigError(
            f"the target of {format_bytes(target)} is too small: at the fewest bits that are chosen from, the weights "
            f"take {format_bytes(least)}, {format_bytes(rest)} of it for tensors that the recipe decides"
        )
    if target > most:
        raise ConfigError(
            f"the target of {format_bytes(target)} is more than the unquantized weights take, {format_bytes(most)}: "
            "convert with --q-bits none, or give a smaller target"
        )
