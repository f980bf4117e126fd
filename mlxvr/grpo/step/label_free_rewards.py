r"""Rewards for rows without an answer.

A row without a label is scored by its own group. Two scores say how good a reviewed answer a2 looks, each in [0, 1]:

    agreement    m * (1 - 0.25 * (1 - own)). m says how far a2 agrees with the group's majority (`step.majority`), own
                 how far the completion's first answer a1 agrees with a2. Agreeing with oneself earns nothing outside
                 the majority, and where a1 declines ("Let's analyze ..") there is nothing to disagree with: own is 1
    coherence    how much more likely the chain makes a2 than it is without a chain (`step.coherence`)

The reward has the shape of the labelled reward, so that rows with and without labels can be mixed:

    s1 = how far a1 agrees with the majority, as m above    s2 = the mean of the scores that are asked for
    R = w_first s1 + w_second s2 + w_format format + w_fallback [a1 declines and s2 > 0.7]

A first answer in the majority earns more than one that declines, which earns more than one outside it, as with labels.
For gqa s1 and s2 stay in [0, 1], where R1 and R2 go to 2.

What this cannot see
- A majority that is sure and wrong. Training makes it surer: what the model mostly says becomes what it always says.
  Only rows with labels, or a validation with labels, show it.
- The difference between a chain that derives an answer and one that merely names it. Coherence is high for either, and
  the less likely an answer was directly, the more there is to gain. It is meant to be used beside agreement.
- Whether unanimous groups are solved or collapsed. `mlxvr.grpo.collapse_guard` reports that they are unanimous, and a
  person decides.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mlxvr.errors import ConfigError
from mlxvr.grading.reward import Reward, Weights, format_reward
from mlxvr.grpo.rollout_config import LABEL_FREE
from mlxvr.grpo.step.majority import agree, both_answers, declines, majority_agreement

__all__ = ["agreement", "label_free_reward"]

_OWN = 0.25  # what a first answer that disagrees costs; little, since a review exists to correct
_SURE = 0.7  # as in the labelled reward
_PAPER = Weights()


def agreement(texts: Sequence[str], kind: str) -> np.ndarray:
    """How far the reviewed answers of a group agree with its majority, and with their own first answers.

    Args:
        texts: G completions of one prompt, without the tokens that ended them.
        kind: of the row: "exact_match", "math", "iou" or "gqa".

    Returns:
        float64 (G,), in [0, 1]; 0 for an empty answer, and for all where fewer than two completions answered.

    Raises as `majority.majority_agreement`.
    """
    firsts, reviewed = both_answers(texts)
    own = [1.0 if declines(first) else agree(first, second, kind) for first, second in zip(firsts, reviewed)]
    return majority_agreement(reviewed, reviewed, kind) * (1.0 - _OWN * (1.0 - np.array(own)))


def label_free_reward(
    parts: Mapping[str, np.ndarray], texts: Sequence[str], kind: str, *, weights: Weights = _PAPER
) -> list[Reward]:
    """Combine a group's scores into rewards, by the formula of this module.

    Args:
        parts: "agreement", "coherence" or both, each (G,), in [0, 1].
        texts: the G completions.
        kind: of the row.
        weights: of the reward's parts.

    Returns:
        A reward for each completion; `first` is s1 and `second` s2.

    Raises:
        ConfigError: there is no score, or one of another name; or as `agreement`.
        DataError: the kind is unknown.
        ValueError: scores and completions differ in number.
    """
    unknown = sorted(set(parts) - set(LABEL_FREE))
    if unknown or not parts:
        raise ConfigError(f"rows without an answer are scored by {' and '.join(LABEL_FREE)}, not by {unknown}")
    if any(np.shape(part) != (len(texts),) for part in parts.values()):
        raise ValueError(f"scores of the shapes {[np.shape(part) for part in parts.values()]} for {len(texts)} texts")
    first_answers, reviewed = both_answers(texts)
    firsts = majority_agreement(first_answers, reviewed, kind)
    seconds = np.mean(list(parts.values()), axis=0)
    rewards = []
    for text, answer, first, second in zip(texts, first_answers, firsts, seconds):
        well_formed, fallback = format_reward(text), float(declines(answer) and second > _SURE)
        total = (
            weights.first * first + weights.second * second + weights.format * well_formed + weights.fallback * fallback
        )
        rewards.append(
            Reward(total=float(total), first=float(first), second=float(second), format=well_formed, fallback=fallback)
        )
    return rewards
