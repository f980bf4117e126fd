"""What GRPO minimises, given log-probs: advantages, clipped ratios, and the KL divergence from the reference policy.

    ratio      exp(log p - log p_old) for each token; or for each completion, exp of the mean over its tokens
    policy     -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)
    KL         exp(d) - d - 1 with d = log p_reference - log p: never negative, and unbiased (k3)
    loss       policy + beta * KL, averaged in one of three ways:
                 grpo      mean over a completion's tokens, then over completions (arXiv 2402.03300)
                 bnpo      mean over all tokens of the group
                 dr_grpo   sum over tokens / (completions * token limit): length has no effect (2503.20783)

Ratios of whole completions are GSPO's (arXiv 2507.18071). Advantages are (reward - mean) / (std + 1e-4) with the n-1
standard deviation, as VideoAuto-R1 computes them. All sums are within a group, since a group is one forward pass.

At the first update after a rollout every ratio is exactly 1, so the policy's part of the loss does not depend on the
policy (for grpo it is -mean(A), which is 0): look at gradients, rewards and KL, not at the loss.
"""

import mlx.core as mx
import numpy as np

from mlxvr.grpo.step.loss_config import LossConfig

__all__ = ["advantages", "objective"]

_STD_FLOOR = 1e-4


def advantages(rewards: np.ndarray, *, scale: bool = True) -> np.ndarray:
    """How much more each completion earned than its group on average: float32 (G,).

    Args:
        rewards: (G,), finite.
        scale: divide by the standard deviation; False: only subtract the mean (Dr. GRPO).

    Returns:
        All zeros where the rewards are equal, as they are for a single completion.

    Raises `ValueError` when a reward is not a finite number.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"rewards {values.tolist()} are not all finite")
    if len(values) == 0 or np.ptp(values) == 0.0:
        return np.zeros(len(values), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow makes the loss infinite, which the update refuses
        centred = values - values.mean()
        return (centred / (values.std(ddof=1) + _STD_FLOOR) if scale else centred).astype(np.float32)


def objective(
    logprobs: mx.array,
    old_logprobs: mx.array,
    reference_logprobs: mx.array | None,
    advantages: mx.array,
    mask: mx.array,
    config: LossConfig,
) -> tuple[mx.array, dict[str, mx.array]]:
    """The loss of a group, and its statistics.

    Args:
        logprobs: float32 (G, T), of each completion's tokens under the policy in training.
        old_logprobs: float32 (G, T), under the policy that sampled them.
        reference_logprobs: float32 (G, T), under the reference policy; needed when `config.beta` is positive.
        advantages: float32 (G,).
        mask: bool (G, T), the tokens that count. A completion without any adds nothing, but counts as a completion.
        config: which loss to compute.

    Returns:
        The loss, and means over the tokens that count, without gradient: "kl", "clip_share" (tokens whose gradient is
        clipped away), "ratio_mean", and "entropy" (minus the mean log-prob, which estimates the entropy on the policy's
        own samples). "kl" is 0 without a reference.
    """
    counts = mask.sum(axis=1)
    total = mx.maximum(counts.sum(), 1)

    def per_completion(values: mx.array) -> mx.array:
        return mx.where(mask, values, 0.0).sum(axis=1)

    def mean(values: mx.array) -> mx.array:
        return mx.stop_gradient(per_completion(values).sum() / total)

    log_ratio = mx.where(mask, logprobs - mx.stop_gradient(old_logprobs), 0.0)
    if config.importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(axis=1, keepdims=True) / mx.maximum(counts, 1)[:, None]
    ratio = mx.exp(log_ratio)
    advantage = mx.stop_gradient(advantages)[:, None]
    lowest, highest = config.clip_range
    clipped = mx.clip(ratio, lowest, highest)
    loss = mx.broadcast_to(-mx.minimum(ratio * advantage, clipped * advantage), logprobs.shape)
    kl = mx.zeros_like(logprobs)
    if reference_logprobs is not None:
        away = mx.where(mask, mx.stop_gradient(reference_logprobs) - logprobs, 0.0)
        kl = mx.expm1(away) - away
        loss = loss + config.beta * kl
    elif config.beta > 0.0:
        raise ValueError("beta is positive: the log-probs of the reference policy are needed")
    sums = per_completion(loss)
    if config.loss_type == "grpo":
        value = (sums / mx.maximum(counts, 1)).mean()
    elif config.loss_type == "bnpo":
        value = sums.sum() / total
    else:
        value = sums.sum() / (mask.shape[0] * (config.max_completion_tokens or 1))
    cut = ((ratio < lowest) & (advantage < 0)) | ((ratio > highest) & (advantage > 0))
    return value, {
        "kl": mean(kl),
        "clip_share": mean(mx.broadcast_to(cut, mask.shape)),
        "ratio_mean": mean(mx.broadcast_to(ratio, mask.shape)),
        "entropy": mean(-logprobs),
    }
