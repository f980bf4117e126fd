"""The figures of a step, for `metrics.jsonl`: each group is summed up where it was made, all of them by rank 0.

What a group's summary holds can be sent as JSON, so that ranks can tell each other.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mlxvr.answering.confidence import should_exit
from mlxvr.grading.reward import most
from mlxvr.grpo.step.gradient import GroupStats
from mlxvr.grpo.step.policy_update import Group
from mlxvr.grpo.validation import RIGHT, look_at
from mlxvr.model.network import VideoModel

__all__ = ["figures_of", "sum_up"]


def sum_up(model: VideoModel, group: Group, stats: GroupStats | None, *, threshold: float) -> dict[str, Any]:
    """What the figures need of a group.

    Args:
        model: that sampled.
        group: with its rewards.
        stats: what its loss saw; None: it was skipped.
        threshold: confidence from which a first answer stands.
    """
    completions, rewards, row = group.rollout.completions, group.judgement.rewards, group.row
    seen = [look_at(model, row, one).scored for one in completions]
    right = RIGHT * most(row.kind)
    labelled = row.answer is not None
    summary: dict[str, Any] = {
        "id": row.id,
        "reward": [one.total for one in rewards],
        "first": [one.first for one in rewards],
        "second": [one.second for one in rewards],
        "format": [one.format for one in rewards],
        "fallback": [one.fallback for one in rewards],
        "first_accuracy": [float(one.first > right) for one in rewards if labelled and not math.isnan(one.first)],
        "second_accuracy": [float(one.second > right) for one in rewards if labelled and not math.isnan(one.second)],
        "think_ratio": [float(not should_exit(one, threshold)) for one in seen],
        "confidence": [one.confidence for one in seen if one is not None],
        "tokens": [len(one.ids) for one in completions],
        "truncated": [float(one.truncated) for one in completions],
        "unanimous": group.is_unanimous,
        "entropy": [-float(one.logprobs.mean()) for one in completions],
        "loss": None,
        "unlabelled": None if group.judgement.unlabelled is None else asdict(group.judgement.unlabelled),
        **{name: part.tolist() for name, part in group.judgement.parts.items()},
    }
    if stats is not None:
        summary |= {"loss": stats.loss, "kl": stats.kl, "clip_share": stats.clip_share, "counted": stats.tokens}
    return summary


def figures_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The figures of a step, from the summaries of all its groups; None where there is nothing to take a mean of."""
    learned = [group for group in groups if group["loss"] is not None]
    tokens = [count for group in groups for count in group["tokens"]]

    def mean(name: str) -> float | None:
        return _mean(value for group in groups for value in group.get(name, ()))

    figures: dict[str, float | None] = {
        "loss": sum(group["loss"] for group in learned) / len(groups) if learned else None,
        "kl": _weighted(learned, "kl"),
        "reward": mean("reward"),
        "reward_std": _mean(_quiet(np.std, group["reward"], ddof=1) for group in groups if len(group["reward"]) > 1),
    }
    for name in ("first", "second", "format", "fallback", "first_accuracy", "second_accuracy", "think_ratio"):
        figures[name] = mean(name)
    figures |= {
        "confidence": mean("confidence"),
        "tokens_mean": _mean(tokens),
        "tokens_max": float(max(tokens)) if tokens else None,
        "truncated": mean("truncated"),
        "clip_share": _weighted(learned, "clip_share"),
        "zero_variance": _mean(float(group["unanimous"]) for group in groups),
        "entropy": mean("entropy"),
    }
    for name in ("agreement", "coherence"):
        if any(name in group for group in groups):
            figures[name] = mean(name)
    return figures


def _mean(values: Iterable[float]) -> float | None:
    """Of those that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    return _quiet(np.mean, known) if known else None


def _quiet(figure: Callable[..., Any], values: Sequence[float], **options: Any) -> float:
    """A figure of rewards that may be as large as a user's own function makes them."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(figure(values, **options))


def _weighted(groups: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean over the tokens that counted in the loss."""
    total = sum(group["counted"] for group in groups)
    return sum(group[name] * group["counted"] for group in groups) / total if total else None
