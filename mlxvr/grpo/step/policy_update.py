"""One step of GRPO: sample completions of rows, score them, and update the adapter.

Groups go through the model one after another, so that memory does not grow with the batch: gradients are always
accumulated. With several ranks, each has its share of the rows; the sums of their gradients are added, and every rank
takes the same step. The gradient is the mean over the groups of all ranks, including groups that were skipped.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxvr.data.rows import Row
from mlxvr.errors import DataError
from mlxvr.grpo.step.gradient import GroupStats, group_gradient
from mlxvr.grpo.step.loss import advantages
from mlxvr.grpo.step.prompts import EncodedPrompt
from mlxvr.grpo.step.reward_model import GroupRewards, RewardModel
from mlxvr.grpo.step.rollout import Rollout, rollout
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.model.network import VideoModel
from mlxvr.runtime.distributed import ProcessGroup
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["NotFinite", "PolicyUpdater", "ScoredGroup", "UpdateStats", "row_seed"]


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoredGroup:
    """A row's completions with their rewards and their advantages, float32 (G,)."""

    rollout: Rollout
    scores: GroupRewards
    advantages: np.ndarray

    @property
    def row(self) -> Row:
        """The row that was asked."""
        return self.rollout.prompt.row

    @property
    def is_unanimous(self) -> bool:
        """Whether all completions earned the same."""
        return not self.advantages.any()

    @property
    def is_truncated(self) -> bool:
        """Whether every completion hit the token limit."""
        return all(completion.truncated for completion in self.rollout.completions)


@dataclass(frozen=True, eq=False, kw_only=True)
class UpdateStats:
    """The statistics of a step's updates.

    Attributes:
        stats: of each group's loss before the first update, except for the share of clipped tokens: it is the mean over
            all updates, since nothing is clipped before the first. None for a group that was skipped.
        grad_norm: norm of the first mean gradient before it was clipped; 0.0 when all groups were skipped.
    """

    stats: Sequence[GroupStats | None]
    grad_norm: float


class NotFinite(DataError):
    """A loss or a gradient is not a finite number; nothing was changed."""


class PolicyUpdater:
    """The policy, a model with an adapter, and its optimizer: samples groups and learns from them.

    Attributes:
        model: with LoRA layers.
        optimizer: of the LoRA weights.
        reference: the adapter of the reference policy; None: the model without adapter.
        is_whole: False from the first update of a step until the caller has finished the step and sets it.
    """

    def __init__(
        self,
        model: VideoModel,
        config: TrainConfig,
        reward_model: RewardModel,
        ranks: ProcessGroup,
        *,
        reference: Mapping[str, mx.array] | None = None,
    ) -> None:
        """Start with a new optimizer."""
        self.model = model
        self.reference = reference
        self.is_whole = True
        self.optimizer = optim.AdamW(config.learning_rate, weight_decay=config.weight_decay, bias_correction=True)
        self._config = config
        self._reward_model = reward_model
        self._ranks = ranks
        self._loss = config.loss

    def sample(self, prompt: EncodedPrompt, step: int, *, should_stop: ShouldStop | None = None) -> ScoredGroup:
        """Sample and score the completions of a row.

        Args:
            prompt: of the row.
            step: from 1; with the run's seed and the row's id it decides which tokens are drawn.
            should_stop: asked between tokens.

        Raises as `rollout` and `RewardModel.score`.
        """
        config = self._config
        group = rollout(
            self.model,
            prompt,
            replace(config.sampling, seed=row_seed(config.seed, step, prompt.row.id)),
            group_size=config.group_size,
            prefill_step_size=config.prefill_step_size,
            should_stop=should_stop,
        )
        scores = self._reward_model.score(self.model, group)
        return ScoredGroup(
            rollout=group,
            scores=scores,
            advantages=advantages(scores.totals, scale=config.scale_rewards),
        )

    def update(self, groups: Sequence[ScoredGroup], rate: float, *, step: int = 0) -> UpdateStats:
        """Learn from this rank's groups, together with all other ranks: `num_iterations` updates.

        Args:
            groups: of this rank; may be empty.
            rate: the learning rate.
            step: from 1; with the run's seed and the rows' ids it decides which inputs dropout drops.

        Returns:
            The statistics of the first update, with the share of clipped tokens in all updates.

        Raises:
            NotFinite: on every rank; the weights are those of the last update.
            ConfigError: a rank is gone.
        """
        self.optimizer.learning_rate = rate
        updates: list[list[GroupStats | None]] = []
        norms: list[float] = []
        for number in range(self._config.num_iterations):
            seeds = [row_seed(self._config.seed, step, group.row.id, "dropout", number) for group in groups]
            first_stats = updates[0] if updates else [None] * len(groups)
            total, stats = self._gradients(groups, first_stats, seeds)
            norm, learned = self._step(total, len(groups), stats)
            updates.append(stats)
            norms.append(norm)
            if not learned:
                break
        return UpdateStats(stats=[_over_updates(group_stats) for group_stats in zip(*updates)], grad_norm=norms[0])

    def _gradients(
        self, groups: Sequence[ScoredGroup], first_stats: Sequence[GroupStats | None], seeds: Sequence[int]
    ) -> tuple[dict[str, mx.array], list[GroupStats | None]]:
        """The sum of the groups' gradients by name, empty if all are skipped, and the statistics of each group.

        `first_stats` are those of the first update on these groups, whose log-probs are the old ones; None before it.
        """
        total: dict[str, mx.array] = {}
        stats: list[GroupStats | None] = []
        for group, first, seed in zip(groups, first_stats, seeds):
            if self._is_skipped(group):
                stats.append(None)
                continue
            gradient, group_stats = group_gradient(
                self.model,
                group.rollout,
                group.advantages,
                config=self._loss,
                temperature=self._config.temperature,
                checkpoint=self._config.gradient_checkpointing,
                old_logprobs=None if first is None else first.logprobs,
                reference_logprobs=None if first is None else first.reference_logprobs,
                reference=self.reference,
                seed=seed,
            )
            flat = dict(cast("list[tuple[str, mx.array]]", tree_flatten(gradient)))
            total = {name: total[name] + array for name, array in flat.items()} if total else flat
            mx.eval(total)
            stats.append(group_stats)
        return total, stats

    def _is_skipped(self, group: ScoredGroup) -> bool:
        """Whether a group's gradient is 0, or comes from the KL term alone and the settings skip it."""
        if self._loss.mask_truncated and group.is_truncated:
            return True
        return group.is_unanimous and (self._config.skip_zero_advantage or self._loss.beta == 0.0)

    def _step(self, total: dict[str, mx.array], count: int, stats: Sequence[GroupStats | None]) -> tuple[float, bool]:
        """Add the ranks' sums and step; returns the gradient's norm, and whether any group was not skipped."""
        learned = sum(group_stats is not None for group_stats in stats)
        loss = sum(group_stats.loss for group_stats in stats if group_stats is not None)
        if self._ranks.size > 1:
            if not total:
                trained = cast("list[Any]", tree_flatten(self.model.network.trainable_parameters()))
                total = {name: mx.zeros(array.shape) for name, array in trained}
            counts = mx.array([count, learned, loss], dtype=mx.float32)
            summed = self._ranks.all_sum({**total, "": counts})
            count, learned, loss = np.array(summed.pop("")).tolist()
            total = summed
        if not learned:
            return 0.0, False
        mean = {name: array / count for name, array in total.items()}
        clipped, norm = optim.clip_grad_norm(mean, self._config.max_grad_norm)
        length = float(norm.item())
        if not (math.isfinite(length) and math.isfinite(loss)):
            raise NotFinite(
                f"the loss is {loss:g} and the gradient's norm {length:g}: lower the learning rate, or leave the "
                "batch's rows out"
            )
        self.is_whole = False
        self.optimizer.update(self.model.network, tree_unflatten(list(clipped.items())))
        mx.eval(self.model.network.trainable_parameters(), self.optimizer.state)
        return length, True


def _over_updates(updates: Sequence[GroupStats | None]) -> GroupStats | None:
    """The statistics of a group's first update, with the mean share of clipped tokens over all updates."""
    first, shares = updates[0], [stats.clip_share for stats in updates if stats is not None]
    return None if first is None else replace(first, clip_share=fmean(shares))


def row_seed(*parts: object) -> int:
    """A seed of 32 bits from the values that a draw depends on."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()[:4])
