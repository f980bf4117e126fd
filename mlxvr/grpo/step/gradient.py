"""The gradient of one group: everything between its rewards and the optimizer.

A prompt, its completions and their advantages go in; the gradient of the LoRA weights and the loss's statistics come
out, evaluated, so that nothing of the pass stays in memory. `policy_update` averages over groups, clips and steps.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxvr.errors import ConfigError
from mlxvr.grpo.step.forward import completion_logprobs
from mlxvr.grpo.step.lora import disable_adapters
from mlxvr.grpo.step.loss import objective
from mlxvr.grpo.step.loss_config import LossConfig
from mlxvr.grpo.step.packing import PackedGroup, pack
from mlxvr.model.adapter import find_layers
from mlxvr.model.network import VideoModel

if TYPE_CHECKING:
    from mlxvr.grpo.step.rollout import Rollout

__all__ = ["GroupStats", "group_gradient", "group_logprobs"]


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupStats:
    """Statistics of a group's loss; shares and means are over the tokens that count (see `loss.objective`).

    Attributes:
        loss: its value.
        kl: divergence from the reference policy; 0 without a reference.
        clip_share: share of tokens whose gradient was clipped away.
        ratio_mean: mean ratio to the policy that sampled.
        entropy: minus the mean log-prob.
        tokens: number of tokens that counted.
        logprobs: float32 (G, T), of this policy before the update, 0 where padded; `old_logprobs` of later updates on
            the same rollout.
        reference_logprobs: float32 (G, T), likewise; None where no reference was needed.
    """

    loss: float
    kl: float
    clip_share: float
    ratio_mean: float
    entropy: float
    tokens: int
    logprobs: np.ndarray
    reference_logprobs: np.ndarray | None


# 10 parameters: a group, log-probs of earlier passes, a reference and a loss, each of which a test sets alone
def group_gradient(
    model: VideoModel,
    rollout: "Rollout",
    advantages: np.ndarray,
    *,
    config: LossConfig,
    temperature: float = 1.0,
    checkpoint: bool = False,
    old_logprobs: np.ndarray | None = None,
    reference_logprobs: np.ndarray | None = None,
    reference: Mapping[str, mx.array] | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], GroupStats]:
    """The gradient of a group's loss with respect to the model's trainable parameters.

    Args:
        model: with LoRA layers (`lora.attach`), otherwise frozen.
        rollout: the prompt and its completions.
        advantages: float32 (G,), see `loss.advantages`.
        config: which loss to compute.
        temperature: the sampling temperature of the completions.
        checkpoint: compute the layers again in the backward pass instead of keeping their arrays: about a third
            of the memory for about 40% more time, and the same gradient.
        old_logprobs: float32 (G, T), of the policy that sampled; None: this policy did, and every ratio is 1 exactly.
        reference_logprobs: float32 (G, T); None: computed here, when `config.beta` is positive.
        reference: the adapter that the reference policy has, a `lora.adapter_state`; None: none.
        seed: decides which inputs dropout drops, if the adapter has dropout.

    Returns:
        The gradient, as a tree like `model.network.trainable_parameters()`, and the loss's statistics; all evaluated.

    Raises:
        ConfigError: there is nothing to train, or something outside the layers; or dropout and `checkpoint` together:
            the second computation would drop other inputs.
        ValueError: shapes that do not fit the group.
    """
    _check_trainable(model)
    packed = pack(rollout.prompt, [completion.ids for completion in rollout.completions])
    mask = packed.mask.copy()
    if config.mask_truncated:
        mask[[completion.truncated for completion in rollout.completions]] = False
    if np.shape(advantages) != mask.shape[:1]:
        raise ValueError(f"{np.shape(advantages)} advantages for {mask.shape[0]} completions")
    for known in (old_logprobs, reference_logprobs):
        if known is not None and known.shape != mask.shape:
            raise ValueError(f"log-probs of the shape {known.shape}; expected {mask.shape}")
    if config.beta > 0.0 and reference_logprobs is None:
        with disable_adapters(model, reference):
            reference_logprobs = _logprobs(model, packed, temperature)

    def loss(_: Any) -> tuple[mx.array, dict[str, mx.array]]:
        logprobs = completion_logprobs(model, packed, temperature=temperature, checkpoint=checkpoint)
        old = mx.stop_gradient(logprobs) if old_logprobs is None else mx.array(old_logprobs)
        fixed_reference = mx.array(reference_logprobs) if reference_logprobs is not None else None
        value, stats = objective(logprobs, old, fixed_reference, mx.array(advantages), mx.array(mask), config)
        return value, {**stats, "logprobs": mx.stop_gradient(logprobs)}

    with _dropout(model, checkpoint, seed), _same_weights(model):
        (value, stats), gradient = nn.value_and_grad(model.network, loss)(None)
        mx.eval(value, stats, gradient)
    logprobs = np.array(stats.pop("logprobs"))
    means = {name: float(mean.item()) for name, mean in stats.items()}
    return gradient, GroupStats(
        loss=float(value.item()),
        tokens=int(mask.sum()),
        logprobs=logprobs,
        reference_logprobs=reference_logprobs,
        **means,
    )


def group_logprobs(model: VideoModel, rollout: "Rollout", *, temperature: float = 1.0) -> np.ndarray:
    """Log-probs of a group's tokens under the policy as it is, without gradient: float32 (G, T), 0 where padded."""
    return _logprobs(model, pack(rollout.prompt, [completion.ids for completion in rollout.completions]), temperature)


def _logprobs(model: VideoModel, packed: PackedGroup, temperature: float) -> np.ndarray:
    return np.array(completion_logprobs(model, packed, temperature=temperature))


def _check_trainable(model: VideoModel) -> None:
    names = [name for name, _ in cast("list[Any]", tree_flatten(model.network.trainable_parameters()))]
    if not names:
        raise ConfigError("the model has nothing to train: attach an adapter first")
    for name in names:  # recomputing passes give other parameters no gradient
        if not name.startswith("language_model.model.layers."):
            raise ConfigError(f"{name} is not frozen: only the language model's layers can be trained")


@contextmanager
def _dropout(model: VideoModel, checkpoint: bool, seed: int) -> Iterator[None]:
    """Turn the dropout of the LoRA layers on while a gradient is computed; sampling never uses it.

    Dropout draws from MLX's global generator, which is seeded here.
    """
    layers = [layer for layer in find_layers(model.network).values() if getattr(layer.dropout, "_p_1", 1.0) < 1.0]
    if layers and checkpoint:
        raise ConfigError("dropout and gradient checkpointing do not go together: set one of them to 0")
    if not layers:
        yield
        return
    mx.random.seed(seed)
    for layer in layers:
        layer.dropout.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.dropout.eval()


@contextmanager
def _same_weights(model: VideoModel) -> Iterator[None]:
    """Restore the modules' own arrays afterwards: tracing leaves its arrays in them."""
    parameters = model.network.trainable_parameters()
    try:
        yield
    finally:
        model.network.update(parameters)
