"""The figures of a step, from groups written down by hand: what is a mean of what, and what is left out."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from mlxvr.data.rows import Row
from mlxvr.grading.reward import Reward
from mlxvr.grpo.monitor import step_metrics as module
from mlxvr.grpo.monitor.step_metrics import step_metrics, summarise_group
from mlxvr.grpo.step.gradient import GroupStats
from mlxvr.grpo.step.reward_model import GroupRewards

ROW = Row(id="a", question="Which?", answer="A")
SEEN = {"sure": 0.99, "unsure": 0.4, "declines": None}  # the confidence of each text's first answer


def completion(text, *, tokens=3, truncated=False, logprob=-0.5):
    logprobs = np.full(tokens, logprob, dtype=np.float32)
    return SimpleNamespace(ids=np.arange(tokens), logprobs=logprobs, text=text, truncated=truncated)


def reward(total, first, second, form=1.0, fallback=0.0):
    return Reward(total=total, first=first, second=second, format=form, fallback=fallback)


def group_of(row, pairs, *, unanimous=False, parts=None):
    scores = GroupRewards(rewards=[earned for _, earned in pairs], parts=parts or {})
    return SimpleNamespace(
        row=row,
        rollout=SimpleNamespace(completions=[one for one, _ in pairs]),
        scores=scores,
        is_unanimous=unanimous,
    )


def stats_of(**values):
    known = {"loss": 0.0, "kl": 0.0, "clip_share": 0.0, "ratio_mean": 1.0, "entropy": 0.0, "tokens": 1}
    return GroupStats(**{**known, **values}, logprobs=np.zeros((1, 1)), reference_logprobs=None)


@pytest.fixture(autouse=True)
def looked_at(monkeypatch):
    """What the reasoner would see in a completion."""

    def read_completion(model, row, one):
        confidence = SEEN[one.text]
        return SimpleNamespace(scored=None if confidence is None else SimpleNamespace(confidence=confidence))

    monkeypatch.setattr(module, "read_completion", read_completion)
    monkeypatch.setattr(
        module, "should_exit", lambda scored, threshold: bool(scored and scored.confidence >= threshold)
    )


def test_a_group_in_figures():
    pairs = [
        (completion("sure", tokens=2, logprob=-1.0), reward(3.0, 1.0, 1.0)),
        (completion("unsure", tokens=6, truncated=True), reward(1.1, 0.0, 1.0, form=0.0)),
        (completion("declines", tokens=4), reward(0.4, 0.0, 0.0, form=0.0, fallback=1.0)),
        (completion("sure", tokens=8), reward(1.0, 0.7, 0.0)),  # what counts as right is above 0.7
    ]
    summary = summarise_group(
        None, group_of(ROW, pairs), stats_of(loss=0.25, kl=0.5, clip_share=0.1, tokens=20), threshold=0.9
    )
    json.dumps(summary)  # ranks send it to each other
    found = step_metrics([summary])
    assert found["reward"] == pytest.approx((3.0 + 1.1 + 0.4 + 1.0) / 4)
    assert found["reward_std"] == pytest.approx(np.std([3.0, 1.1, 0.4, 1.0], ddof=1))
    assert (found["first_accuracy"], found["second_accuracy"]) == (0.25, 0.5)
    assert (found["rewards/first/mean"], found["rewards/second/mean"]) == (pytest.approx(1.7 / 4), 0.5)
    assert (found["rewards/format/mean"], found["rewards/fallback/mean"]) == (0.5, 0.25)
    assert found["think_ratio"] == 0.5  # one is unsure, one declines
    assert found["confidence"] == pytest.approx((0.99 + 0.4 + 0.99) / 3)
    assert (found["completions/mean_length"], found["completions/max_length"], found["completions/clipped_ratio"]) == (
        5.0,
        8.0,
        0.25,
    )
    assert found["entropy"] == pytest.approx((1.0 + 0.5 * 3) / 4)
    assert (found["loss"], found["kl"], found["clip_ratio/region_mean"], found["frac_reward_zero_std"]) == (
        0.25,
        0.5,
        0.1,
        0.0,
    )


def test_several_groups():
    """Means are over completions; the loss over all groups, kl and clips over the tokens that counted."""
    first = summarise_group(
        None,
        group_of(ROW, [(completion("sure"), reward(1.0, 1.0, 1.0)), (completion("sure"), reward(0.0, 0.0, 0.0))]),
        stats_of(loss=0.6, kl=1.0, clip_share=0.5, tokens=10),
        threshold=0.9,
    )
    second = summarise_group(
        None,
        group_of(ROW, [(completion("sure"), reward(2.0, 1.0, 1.0))] * 3, unanimous=True),
        None,
        threshold=0.9,
    )
    third = summarise_group(
        None,
        group_of(ROW, [(completion("sure"), reward(0.0, 0.0, 0.0)), (completion("sure"), reward(4.0, 1.0, 1.0))]),
        stats_of(loss=0.0, kl=4.0, clip_share=0.0, tokens=30),
        threshold=0.9,
    )
    found = step_metrics([first, second, third])
    assert found["reward"] == pytest.approx((1.0 + 3 * 2.0 + 4.0) / 7)
    assert found["reward_std"] == pytest.approx((np.sqrt(0.5) + 0.0 + np.sqrt(8.0)) / 3)
    assert found["loss"] == pytest.approx(0.6 / 3)
    assert found["kl"] == pytest.approx((1.0 * 10 + 4.0 * 30) / 40)
    assert found["clip_ratio/region_mean"] == pytest.approx(0.5 * 10 / 40)
    assert found["frac_reward_zero_std"] == pytest.approx(1 / 3)


def test_figures_that_there_are_not():
    """A number says nothing of its parts, and a row without answer nothing of accuracy."""
    own = [(completion("sure"), reward(2.0, math.nan, math.nan, math.nan, math.nan))] * 2
    found = step_metrics([summarise_group(None, group_of(ROW, own), None, threshold=0.9)])
    assert found["reward"] == 2.0
    assert {name for name, value in found.items() if value is None} == {
        *(
            "loss",
            "kl",
            "clip_ratio/region_mean",
            "rewards/first/mean",
            "rewards/second/mean",
            "rewards/format/mean",
            "rewards/fallback/mean",
            "first_accuracy",
            "second_accuracy",
        )
    }
    unlabelled = Row(id="b", question="Which?", answer=None)
    parts = {"agreement": np.array([0.5, 1.0]), "coherence": np.array([0.0, 0.5])}
    pairs = [(completion("sure"), reward(1.0, 1.0, 1.0))] * 2
    found = step_metrics([summarise_group(None, group_of(unlabelled, pairs, parts=parts), None, threshold=0.9)])
    assert (found["rewards/agreement/mean"], found["rewards/coherence/mean"]) == (0.75, 0.25)
    assert found["first_accuracy"] is None
    assert step_metrics([])["reward"] is None
    both = Row(id="c", question="Which?", answer=["A", [[1.0, 2.0]]], kind="gqa")
    pairs = [(completion("sure"), reward(1.0, 1.0, 1.5)), (completion("sure"), reward(1.0, 1.4, 2.0))]
    found = step_metrics([summarise_group(None, group_of(both, pairs), None, threshold=0.9)])
    assert (found["first_accuracy"], found["second_accuracy"]) == (0.0, 1.0)  # of 2 that can be earned


# "Logged metrics" of GRPOTrainer in TRL 1.16 that we have; `rewards/<function>/mean` comes beside them.
TRL = {"loss", "grad_norm", "learning_rate", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy"}
TRL |= {"completions/mean_length", "completions/max_length", "completions/clipped_ratio", "clip_ratio/region_mean"}
OWN = {"first_accuracy", "second_accuracy", "think_ratio", "confidence"}


def test_the_names_are_those_of_trl():
    parts = {"agreement": np.ones(2), "coherence": np.ones(2)}
    pairs = [(completion("sure"), reward(1.0, 1.0, 1.0))] * 2
    names = set(step_metrics([summarise_group(None, group_of(ROW, pairs, parts=parts), None, threshold=0.9)]))
    rewards = {name for name in names if name.startswith("rewards/")}
    used = ("first", "second", "format", "fallback", "agreement", "coherence")
    assert rewards == {f"rewards/{part}/mean" for part in used}
    assert names - rewards == (TRL - {"grad_norm", "learning_rate"}) | OWN
