"""How a model answers rows that it does not learn from: greedily, once, and judged for both answers.

One completion of a row says what direct, think and auto would give: the early exit changes where the answer ends, not
what comes before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlxvr.answering.confidence import should_exit
from mlxvr.answering.loop import Outcome, run_answer_loop
from mlxvr.data.rows import Row
from mlxvr.grading.reward import RewardFunction, Weights, call_reward, highest_reward, score
from mlxvr.grpo.step.rollout import Completion, Rollout
from mlxvr.model.decode import Token
from mlxvr.model.network import VideoModel

__all__ = ["RIGHT", "ValidatedRow", "read_completion", "summarise", "validate_answer"]

RIGHT = 0.7  # share of what can be earned from which an answer counts as right, as in the reward


@dataclass(frozen=True, kw_only=True)
class ValidatedRow:
    """One answered row; accuracies are 1.0 or 0.0.

    Attributes:
        first, second: whether the two answers were right.
        auto: whether the answer was that stands at the threshold.
        confidence: of the first answer; None: it has none.
        reasoned: whether auto reasons.
        tokens: that auto writes.
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


def read_completion(model: VideoModel, row: Row, completion: Completion) -> Outcome:
    """Read a completion as the reasoner would: the direct answer, its confidence, and where it ends."""
    outcome = Outcome()
    tokens = [Token(*pair) for pair in zip(completion.ids.tolist(), completion.logprobs.tolist())]
    opening = model.tokenizer.encode(row.response_prefix, literal=(0, len(row.response_prefix)))
    for _ in run_answer_loop(
        tokens,
        model.tokenizer.decode,
        outcome,
        mode="think",
        threshold=1.0,
        max_tokens=len(tokens) + 1,
        stop_ids=model.eos_ids,
        response_prefix_ids=opening,
    ):
        pass
    return outcome


def validate_answer(
    model: VideoModel, group: Rollout, *, threshold: float, weights: Weights, own: RewardFunction | None = None
) -> ValidatedRow:
    """Judge the one greedy completion of a labelled row.

    Whether an answer is right follows the paper's rules, whatever the reward: the row's label says what is right.

    Args:
        model: that wrote it.
        group: with one completion.
        threshold: confidence from which the first answer stands.
        weights: of the paper's reward.
        own: takes the place of the paper's reward; None: it does not.

    Raises the same as `score` and `call_reward`.
    """
    row, completion = group.prompt.row, group.completions[0]
    outcome = read_completion(model, row, completion)
    earned = score(group.texts[0], row.answer, row.kind, weights=weights)
    first, second = (float(part > RIGHT * highest_reward(row.kind)) for part in (earned.first, earned.second))
    stands = should_exit(outcome.scored, threshold)
    return ValidatedRow(
        first=first,
        second=second,
        auto=first if stands else second,
        confidence=None if outcome.scored is None else outcome.scored.confidence,
        reasoned=float(not stands),
        tokens=outcome.first_answer_tokens if stands else len(completion.ids),
        format=earned.format,
        reward=earned.total if own is None else call_reward(own, group.texts[0], row).total,
    )


def summarise(judged: Sequence[ValidatedRow]) -> Mapping[str, float | None]:
    """Means over rows, by the names that they have in `metrics.jsonl`."""
    confidences = [one.confidence for one in judged if one.confidence is not None]

    def mean(name: str) -> float:
        return float(np.mean([getattr(one, name) for one in judged]))

    return {
        "valid_first_accuracy": mean("first"),
        "valid_second_accuracy": mean("second"),
        "valid_auto_accuracy": mean("auto"),
        "valid_confidence": float(np.mean(confidences)) if confidences else None,
        "valid_think_ratio": mean("reasoned"),
        "valid_tokens": mean("tokens"),
        "valid_format": mean("format"),
        "valid_reward": mean("reward"),
        "valid_rows": len(judged),
    }
