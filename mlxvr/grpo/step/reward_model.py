"""What the completions of a group earn: the paper's reward, the user's own, or a reward that needs no labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxvr.data.rows import Row
from mlxvr.errors import DataError
from mlxvr.grading.reward import Reward, RewardFunction, Weights, call_reward, score
from mlxvr.grpo.collapse_guard import GroupAnswer, summarise_answers
from mlxvr.grpo.step.coherence import coherence
from mlxvr.grpo.step.label_free_rewards import agreement, label_free_reward
from mlxvr.grpo.step.rollout import Rollout
from mlxvr.model.network import VideoModel

__all__ = ["GroupRewards", "RewardModel"]


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupRewards:
    """What a group earned.

    Attributes:
        rewards: of each completion.
        parts: scores (G,) of a row without an answer, by name; empty for rows with an answer.
        unlabelled: what a group without an answer says, for the collapse guard; None for rows with an answer.
    """

    rewards: Sequence[Reward]
    parts: dict[str, np.ndarray]
    unlabelled: GroupAnswer | None = None

    @property
    def totals(self) -> np.ndarray:
        """The rewards as numbers: float64 (G,)."""
        return np.array([reward.total for reward in self.rewards])


class RewardModel:
    """Scores groups of completions by the rules of a run."""

    def __init__(
        self, *, weights: Weights, own: RewardFunction | None = None, label_free: Sequence[str] = (), temperature: float
    ):
        """Set the rules.

        Args:
            weights: of the reward's parts.
            own: the user's function, which replaces the paper's reward.
            label_free: the scores of rows without an answer, from `rollout_config.LABEL_FREE`.
            temperature: the temperature that completions are sampled at.
        """
        self._weights = weights
        self._own = own
        self._label_free = tuple(label_free)
        self._temperature = temperature

    def score(self, model: VideoModel, group: Rollout) -> GroupRewards:
        """Score the completions of a row.

        Raises:
            DataError: the row has no answer and no label-free score is chosen, its answer has the wrong form, or the
                user's function returned something that is no reward; the message begins with the row's line.
            ConfigError: the row needs a package that is not installed.
        """
        row = group.prompt.row
        if self._own is not None:
            return GroupRewards(rewards=[call_reward(self._own, text, row) for text in group.texts], parts={})
        if row.answer is not None:
            return GroupRewards(rewards=self._labelled_rewards(group, row), parts={})
        if not self._label_free:
            raise DataError(f"{row.line}: the row has no answer: add it, or use --reward agreement,coherence")
        parts = {}
        if "agreement" in self._label_free:
            parts["agreement"] = agreement(group.texts, row.kind)
        if "coherence" in self._label_free:
            parts["coherence"] = coherence(model, group, temperature=self._temperature)
        rewards = label_free_reward(parts, group.texts, row.kind, weights=self._weights)
        return GroupRewards(rewards=rewards, parts=parts, unlabelled=summarise_answers(row, group.texts))

    def _labelled_rewards(self, group: Rollout, row: Row) -> list[Reward]:
        try:
            return [score(text, row.answer, row.kind, weights=self._weights) for text in group.texts]
        except DataError as error:
            raise DataError(f"{row.line}: {error}") from error
