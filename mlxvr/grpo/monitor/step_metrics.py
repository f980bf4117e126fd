"""The metrics of a training step, for `metrics.jsonl`.

Each rank summarises its own groups, and rank 0 takes the means over the summaries of all ranks. A summary is
JSON-ready, so that ranks can send it to each other.

Names are those of TRL's GRPOTrainer (1.16) where the meaning is the same. Where TRL leaves room:

- `reward_std` is the mean over groups of the standard deviation within a group (ddof 1), which is what TRL documents
  for rewards that are scaled by group;
- `rewards/<part>/mean` is the mean of a part before its weight is applied;
- `completions/clipped_ratio` is the share of completions that hit the token limit instead of ending;
- `clip_ratio/region_mean` and `kl` are means over the tokens that count in the loss;
- `entropy` is minus the mean log-prob of the sampled tokens, which estimates the entropy that TRL computes from whole
  distributions; it is a mean over completions, where TRL takes the mean over tokens.

`first_accuracy`, `second_accuracy`, `think_ratio` and `confidence` are our own: TRL has nothing like them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mlxvr.answering.confidence import should_exit
from mlxvr.grading.reward import highest_reward
from mlxvr.grpo.step.gradient import GroupStats
from mlxvr.grpo.step.policy_update import ScoredGroup
from mlxvr.grpo.validation import RIGHT, read_completion
from mlxvr.model.network import VideoModel

__all__ = ["step_metrics", "summarise_group"]

_PARTS = ("first", "second", "format", "fallback")  # of every reward
_LABEL_FREE_PARTS = ("agreement", "coherence")  # only of rows that are rewarded without their answers


def summarise_group(
    model: VideoModel, group: ScoredGroup, stats: GroupStats | None, *, threshold: float
) -> dict[str, Any]:
    """Summarise a group: what its step's metrics need, as JSON-ready values.

    Args:
        model: the model that sampled the group.
        group: with its rewards.
        stats: what the loss measured; None: the group was skipped.
        threshold: the confidence from which a first answer is final.
    """
    completions, rewards, row = group.rollout.completions, group.scores.rewards, group.row
    scores = [read_completion(model, row, completion).scored for completion in completions]
    right = RIGHT * highest_reward(row.kind)
    is_labelled = row.answer is not None
    summary: dict[str, Any] = {
        "id": row.id,
        "reward": [reward.total for reward in rewards],
        **{part: [getattr(reward, part) for reward in rewards] for part in _PARTS},
        "first_accuracy": [float(r.first > right) for r in rewards if is_labelled and not math.isnan(r.first)],
        "second_accuracy": [float(r.second > right) for r in rewards if is_labelled and not math.isnan(r.second)],
        "think_ratio": [float(not should_exit(score, threshold)) for score in scores],
        "confidence": [score.confidence for score in scores if score is not None],
        "tokens": [len(completion.ids) for completion in completions],
        "truncated": [float(completion.truncated) for completion in completions],
        "unanimous": group.is_unanimous,
        "entropy": [-float(completion.logprobs.mean()) for completion in completions],
        "loss": None,
        "unlabelled": None if group.scores.unlabelled is None else asdict(group.scores.unlabelled),
        **{part: values.tolist() for part, values in group.scores.parts.items()},
    }
    if stats is not None:
        summary |= {"loss": stats.loss, "kl": stats.kl, "clip_share": stats.clip_share, "counted": stats.tokens}
    return summary


def step_metrics(groups: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the metrics of a step from the summaries of all its groups; None where there is nothing to average."""
    learned = [group for group in groups if group["loss"] is not None]
    lengths = [length for group in groups for length in group["tokens"]]

    def mean(name: str) -> float | None:
        return _mean(value for group in groups for value in group.get(name, ()))

    used = [part for part in _LABEL_FREE_PARTS if any(part in group for group in groups)]
    return {
        "loss": sum(group["loss"] for group in learned) / len(groups) if learned else None,
        "kl": _token_mean(learned, "kl"),
        "reward": mean("reward"),
        "reward_std": _mean(_quiet(np.std, group["reward"], ddof=1) for group in groups if len(group["reward"]) > 1),
        **{f"rewards/{part}/mean": mean(part) for part in (*_PARTS, *used)},
        **{name: mean(name) for name in ("first_accuracy", "second_accuracy", "think_ratio", "confidence")},
        "completions/mean_length": _mean(lengths),
        "completions/max_length": float(max(lengths)) if lengths else None,
        "completions/clipped_ratio": mean("truncated"),
        "clip_ratio/region_mean": _token_mean(learned, "clip_share"),
        "frac_reward_zero_std": _mean(float(group["unanimous"]) for group in groups),
        "entropy": mean("entropy"),
    }


def _mean(values: Iterable[float]) -> float | None:
    """Return the mean of the values that are numbers; None where there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    return _quiet(np.mean, numbers) if numbers else None


def _quiet(statistic: Callable[..., Any], values: Sequence[float], **options: Any) -> float:
    """Compute a statistic of rewards, which may be as large as a user's own function makes them, without warnings."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(statistic(values, **options))


def _token_mean(groups: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean over the tokens that counted in the loss."""
    total = sum(group["counted"] for group in groups)
    return sum(group[name] * group["counted"] for group in groups) / total if total else None
