"""Validation: how a model answers rows that it does not learn from, greedily, once, and judged for both answers.

One completion of a row tells what direct, think and auto would give: the early exit changes where the answer ends, not
what comes before it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from mlxvr.answering.confidence import should_exit
from mlxvr.answering.loop import Outcome, run_answer_loop
from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.data.prefetch import read_ahead
from mlxvr.data.rows import Row
from mlxvr.errors import DataError
from mlxvr.grading.reward import RewardFunction, Weights, call_reward, highest_reward, score
from mlxvr.grpo.step.prompts import encode_row
from mlxvr.grpo.step.rollout import Completion, Rollout, rollout
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.media.spec import VisionSpec
from mlxvr.model.decode import Token
from mlxvr.model.network import VideoModel
from mlxvr.runtime.distributed import ProcessGroup
from mlxvr.runtime.hooks import Hooks

__all__ = ["RIGHT", "ValidatedRow", "Validator", "read_completion", "summarise", "validate_answer"]

RIGHT = 0.7  # share of the highest reward from which an answer counts as right, as in the reward


@dataclass(frozen=True, kw_only=True)
class ValidatedRow:
    """A row that was answered; accuracies are 1.0 or 0.0.

    Attributes:
        first, second: whether the first and the second answer are right.
        auto: whether the answer that auto gives at the threshold is right.
        confidence: of the first answer; None: it has none.
        reasoned: 1.0 if auto reasons, else 0.0.
        tokens: the tokens that auto writes.
        format: whether the format was kept.
        reward: the paper's, or the user's own.
    """

    first: float
    second: float
    auto: float
    confidence: float | None
    reasoned: float
    tokens: int
    format: float
    reward: float


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Measures a model on validation rows.

    Attributes:
        model: the policy.
        config: of the run.
        ranks: this process among the others, which share the rows.
        spec: how frames are sampled and sized.
        threshold: confidence from which the first answer is final.
        weights: of the paper's reward.
        own_reward: replaces the paper's reward; None: it does not.
    """

    model: VideoModel
    config: TrainConfig
    ranks: ProcessGroup
    spec: VisionSpec
    threshold: float
    weights: Weights
    own_reward: RewardFunction | None

    def measure(self, rows: Sequence[Row], hooks: Hooks) -> Mapping[str, float | None] | None:
        """Metrics over all rows, from all ranks; None: some rank was asked to stop.

        Raises `DataError` for a row that cannot be read.
        """
        own_rows = rows[self.ranks.rank :: self.ranks.size]
        validated: list[ValidatedRow] = []
        with closing(read_ahead(own_rows, self.spec)) as media:
            for done, (row, (vision, _)) in enumerate(zip(own_rows, media)):
                if hooks.should_stop is not None and hooks.should_stop():
                    break
                if isinstance(vision, Exception):
                    raise DataError(f"{row.line}: {vision}") from vision
                prompt = encode_row(self.model, row, spec=self.spec, vision=vision)
                greedy = rollout(
                    self.model,
                    prompt,
                    SamplingConfig(max_tokens=self.config.max_completion_tokens, temperature=0.0, seed=0),
                    group_size=1,
                    prefill_step_size=self.config.prefill_step_size,
                )
                validated.append(
                    validate_answer(
                        self.model, greedy, threshold=self.threshold, weights=self.weights, own_reward=self.own_reward
                    )
                )
                if hooks.progress is not None:
                    hooks.progress("validate", done + 1, len(own_rows))
        parts = self.ranks.all_gather(json.dumps([dataclasses.asdict(row) for row in validated]).encode())
        from_all_ranks = [ValidatedRow(**values) for part in parts for values in json.loads(part)]
        return summarise(from_all_ranks) if len(from_all_ranks) == len(rows) else None


def read_completion(model: VideoModel, row: Row, completion: Completion) -> Outcome:
    """Read a completion as the reasoner would: its direct answer, the answer's confidence, and where it ends."""
    outcome = Outcome()
    tokens = [Token(*pair) for pair in zip(completion.ids.tolist(), completion.logprobs.tolist())]
    prefix_ids = model.tokenizer.encode(row.response_prefix, literal=(0, len(row.response_prefix)))
    for _ in run_answer_loop(
        tokens,
        model.tokenizer.decode,
        outcome,
        mode="think",
        threshold=1.0,
        max_tokens=len(tokens) + 1,
        stop_ids=model.eos_ids,
        response_prefix_ids=prefix_ids,
    ):
        pass
    return outcome


def validate_answer(
    model: VideoModel,
    group: Rollout,
    *,
    threshold: float,
    weights: Weights,
    own_reward: RewardFunction | None = None,
) -> ValidatedRow:
    """Judge the single greedy completion of a labelled row.

    Whether an answer is right follows the paper's rules, whatever the reward is: the row's label says what is right.

    Args:
        model: that wrote the completion.
        group: with one completion.
        threshold: confidence from which the first answer is final.
        weights: of the paper's reward.
        own_reward: replaces the paper's reward; None: it does not.

    Raises as `reward.score` and `reward.call_reward`.
    """
    row, completion = group.prompt.row, group.completions[0]
    outcome = read_completion(model, row, completion)
    reward = score(group.texts[0], row.answer, row.kind, weights=weights)
    first, second = (float(part > RIGHT * highest_reward(row.kind)) for part in (reward.first, reward.second))
    exits = should_exit(outcome.scored, threshold)
    return ValidatedRow(
        first=first,
        second=second,
        auto=first if exits else second,
        confidence=None if outcome.scored is None else outcome.scored.confidence,
        reasoned=float(not exits),
        tokens=outcome.first_answer_tokens if exits else len(completion.ids),
        format=reward.format,
        reward=reward.total if own_reward is None else call_reward(own_reward, group.texts[0], row).total,
    )


def summarise(rows: Sequence[ValidatedRow]) -> Mapping[str, float | None]:
    """Means over rows, by the names that they have in `metrics.jsonl`."""
    confidences = [row.confidence for row in rows if row.confidence is not None]

    def mean(name: str) -> float:
        return float(np.mean([getattr(row, name) for row in rows]))

    return {
        "valid_first_accuracy": mean("first"),
        "valid_second_accuracy": mean("second"),
        "valid_auto_accuracy": mean("auto"),
        "valid_confidence": float(np.mean(confidences)) if confidences else None,
        "valid_think_ratio": mean("reasoned"),
        "valid_tokens": mean("tokens"),
        "valid_format": mean("format"),
        "valid_reward": mean("reward"),
        "valid_rows": len(rows),
    }
