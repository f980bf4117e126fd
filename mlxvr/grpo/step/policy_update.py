"""One step of GRPO: completions of some rows, what they earned, and an update of the adapter.

Groups go through the model one after another, so that memory does not grow with the batch: a step is always
accumulated. With several ranks each has its share of the rows; sums of gradients are brought together, and every rank
takes the same step. The gradient is the mean over the groups of all ranks, whether they could teach anything or not.
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
    """A row's completions, what they earned, and how much better each did than the others: float32 (G,)."""

    rollout: Rollout
    scores: GroupRewards
    advantages: np.ndarray

    @property
    def row(self) -> Row:
        """That was asked."""
        return self.rollout.prompt.row

    @property
    def is_unanimous(self) -> bool:
        """Whether all completions earned the same."""
        return not self.advantages.any()

    @property
    def is_truncated(self) -> bool:
        """Whether no completion came to its end."""
        return all(one.truncated for one in self.rollout.completions)


@dataclass(frozen=True, eq=False, kw_only=True)
class UpdateStats:
    """What an update was.

    Attributes:
        stats: what each group's loss saw before the first update, but for the share that clips cut off: before that
            update they cut nothing, so it is the mean over all of them. None for a group that was skipped.
        grad_norm: of the mean gradient, before it was cut; 0.0 when no group taught anything.
    """

    stats: Sequence[GroupStats | None]
    grad_norm: float


class NotFinite(DataError):
    """A loss or a gradient is not a finite number; nothing was changed."""


class PolicyUpdater:
    """A model with an adapter, its optimizer, and how to take a step.

    Attributes:
        model: with LoRA layers.
        optimizer: of their weights.
        reference: the adapter of the reference policy; None: the model without one.
        is_whole: False from the first update of a step on, until whoever takes steps says that it is done.
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
        """Begin with an optimizer that has seen nothing."""
        self.model = model
        self.reference = reference
        self.is_whole = True
        self.optimizer = optim.AdamW(config.learning_rate, weight_decay=config.weight_decay, bias_correction=True)
        self._config = config
        self._reward_model = reward_model
        self._ranks = ranks
        self._loss = config.loss

    def sample(self, prompt: EncodedPrompt, step: int, *, should_stop: ShouldStop | None = None) -> ScoredGroup:
        """Sample and judge the completions of a row.

        Args:
            prompt: of the row.
            step: from 1; with the run's seed and the row's id it decides what is drawn.
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
        """Learn from this rank's groups, together with all other ranks, as often as the settings say.

        Args:
            groups: may be empty.
            rate: the learning rate.
            step: from 1; with the run's seed and the rows' ids it decides what dropout drops.

        Returns:
            What the first update saw and did, and how much the clips cut off in all of them.

        Raises:
            NotFinite: on every rank alike; the weights are those of the last update.
            ConfigError: a rank is gone.
        """
        self.optimizer.learning_rate = rate
        every: list[list[GroupStats | None]] = []
        norms: list[float] = []
        for number in range(self._config.num_iterations):
            seeds = [row_seed(self._config.seed, step, group.row.id, "dropout", number) for group in groups]
            total, now = self._gradients(groups, every[0] if every else [None] * len(groups), seeds)
            norm, learned = self._step(total, len(groups), now)
            every.append(now)
            norms.append(norm)
            if not learned:
                break
        return UpdateStats(stats=[_over_updates(seen) for seen in zip(*every)], grad_norm=norms[0])

    def _gradients(
        self, groups: Sequence[ScoredGroup], before: Sequence[GroupStats | None], seeds: Sequence[int]
    ) -> tuple[dict[str, mx.array], list[GroupStats | None]]:
        """The sum of the groups' gradients by name, empty without any, and what they saw."""
        total: dict[str, mx.array] = {}
        stats: list[GroupStats | None] = []
        for group, known, seed in zip(groups, before, seeds):
            if self._teaches_nothing(group):
                stats.append(None)
                continue
            gradient, seen = group_gradient(
                self.model,
                group.rollout,
                group.advantages,
                config=self._loss,
                temperature=self._config.temperature,
                checkpoint=self._config.gradient_checkpointing,
                old_logprobs=None if known is None else known.logprobs,
                reference_logprobs=None if known is None else known.reference_logprobs,
                reference=self.reference,
                seed=seed,
            )
            flat = dict(cast("list[tuple[str, mx.array]]", tree_flatten(gradient)))
            total = {name: total[name] + array for name, array in flat.items()} if total else flat
            mx.eval(total)
            stats.append(seen)
        return total, stats

    def _teaches_nothing(self, group: ScoredGroup) -> bool:
        """Whether a group's gradient is 0, or only its distance's pull and that is not wanted."""
        if self._loss.mask_truncated and group.is_truncated:
            return True
        return group.is_unanimous and (self._config.skip_zero_advantage or self._loss.beta == 0.0)

    def _step(self, total: dict[str, mx.array], count: int, stats: Sequence[GroupStats | None]) -> tuple[float, bool]:
        """Bring the ranks' sums together and step: the gradient's norm, and whether there was anything to learn."""
        learned = sum(seen is not None for seen in stats)
        loss = sum(seen.loss for seen in stats if seen is not None)
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


def _over_updates(seen: Sequence[GroupStats | None]) -> GroupStats | None:
    first, shares = seen[0], [one.clip_share for one in seen if one is not None]
    return None if first is None else replace(first, clip_share=fmean(shares))


def row_seed(*parts: object) -> int:
    """A seed of 32 bits from what a draw depends on."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()[:4])
