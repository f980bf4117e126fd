"""What judges a group: the paper's reward, the user's own function, or what needs no labels."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from mlxvr.data.rows import Row
from mlxvr.errors import ConfigError, DataError
from mlxvr.grading.reward import Reward, Weights
from mlxvr.grpo.step.reward_model import RewardModel

ROW = Row(id="a", question="Which?", answer="B", line="rows.jsonl:7")
GOOD = "\\boxed{B}<think>So.</think>\\boxed{B}"
BAD = "\\boxed{A}<think>So.</think>\\boxed{B}"


def group_of(row, *texts):
    return SimpleNamespace(prompt=SimpleNamespace(row=row), texts=list(texts))


def reward_model(**options):
    return RewardModel(**{"weights": Weights(), "temperature": 1.0, **options})


def test_the_papers_reward_with_its_weights():
    """0.9 + 1.1 + 1.0 for all of it; the user's weights in their place."""
    earned = reward_model().score(None, group_of(ROW, GOOD, BAD, "nothing"))
    np.testing.assert_allclose(earned.totals, [3.0, 2.1, 0.0])
    assert (earned.parts, earned.unlabelled) == ({}, None)
    weights = Weights(first=1.0, second=10.0, format=100.0, fallback=1000.0)
    earned = reward_model(weights=weights).score(None, group_of(ROW, GOOD, BAD))
    np.testing.assert_allclose(earned.totals, [111.0, 110.0])


def test_the_users_own_function_takes_its_place():
    asked = []

    def own(text, row):
        asked.append((text, row))
        return Reward(total=5.0, first=0.1, second=0.2, format=0.3, fallback=0.4) if text == GOOD else True

    earned = reward_model(own=own).score(None, group_of(ROW, GOOD, BAD))
    np.testing.assert_array_equal(earned.totals, [5.0, 1.0])
    assert asked == [(GOOD, ROW), (BAD, ROW)]
    assert earned.rewards[0].second == 0.2
    assert math.isnan(earned.rewards[1].second)
    without = Row(id="a", question="Which?", answer=None, line="rows.jsonl:8")
    assert reward_model(own=own).score(None, group_of(without, BAD)).totals.tolist() == [1.0]


@pytest.mark.parametrize("returned", [math.nan, math.inf, "1", None, [1.0]])
def test_what_is_no_reward(returned):
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the reward function returned"):
        reward_model(own=lambda text, row: returned).score(None, group_of(ROW, GOOD))


def test_a_function_that_fails():
    with pytest.raises(ConfigError, match=r"rows\.jsonl:7: the reward function failed \(ZeroDivisionError"):
        reward_model(own=lambda text, row: 1 / 0).score(None, group_of(ROW, GOOD))


def test_rows_without_an_answer():
    """Agreement: how many of the others say the same; without anything that judges them they are refused."""
    row = Row(id="a", question="Which?", answer=None, line="rows.jsonl:9")
    with pytest.raises(DataError, match=r"rows\.jsonl:9: the row has no answer: add it, or use --reward"):
        reward_model().score(None, group_of(row, GOOD))
    earned = reward_model(label_free=("agreement",)).score(None, group_of(row, GOOD, GOOD, BAD.replace("B}", "C}")))
    assert list(earned.parts) == ["agreement"]
    assert earned.parts["agreement"][0] > earned.parts["agreement"][2]
    assert earned.unlabelled is not None


def test_a_truth_of_the_wrong_form_names_its_row():
    row = Row(id="a", question="When?", answer="soon", kind="iou", line="rows.jsonl:3")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: answer 'soon' holds no segment"):
        reward_model().score(None, group_of(row, GOOD))
