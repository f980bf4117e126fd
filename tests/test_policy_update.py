"""A step's update against one written down here: naive gradients, one completion at a time, and AdamW in NumPy."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from groups import make_group, stir, tiny_model
from test_gradient import naive_gradient, naive_logprobs

from mlxvr.grpo.step import policy_update
from mlxvr.grpo.step.lora import attach, disable_adapters, lora_weights
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.grpo.step.policy_update import PolicyUpdater, ScoredGroup
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.runtime.distributed import ProcessGroup

RATE, DECAY, CUT, BETA = 2e-3, 0.1, 0.5, 0.2
VARIED = np.array([0.8, -1.3, 0.6, -0.1], dtype=np.float32)
EQUAL = np.zeros(4, dtype=np.float32)


@pytest.fixture
def model(tmp_path):
    model = tiny_model(tmp_path / "m", "qwen3_vl")
    attach(model, LoraConfig(rank=4), seed=1)
    stir(model)
    return model


def group_of(model, advantages, **options):
    return ScoredGroup(rollout=make_group(model, **options), scores=SimpleNamespace(), advantages=advantages)


def updater_of(model, tmp_path, **settings):
    settings = {
        "weight_decay": DECAY,
        "max_grad_norm": CUT,
        "beta": BETA,
        "epsilon": 0.01,
        "epsilon_high": 0.2,
        **settings,
    }
    config = TrainConfig(data=tmp_path / "rows.jsonl", output=tmp_path / "run", **settings)
    return PolicyUpdater(model, config, None, ProcessGroup())


def weights_of(model):
    return {name: np.array(array, dtype=np.float64) for name, array in lora_weights(model).items()}


def put(model, weights):
    model.network.load_weights([(name, mx.array(array.astype(np.float32))) for name, array in weights.items()], False)


def naive_updates(model, group, groups, updates):
    """Weights after so many updates from one group that teaches among `groups`; each one's cut share and length."""
    begun = weights_of(model)
    count = len(group.completions)
    old = [np.array(naive_logprobs(model, group, index)) for index in range(count)]
    with disable_adapters(model):
        reference = [np.array(naive_logprobs(model, group, index)) for index in range(count)]
    weights, first = begun, dict.fromkeys(begun, 0.0)
    second, cut, shares, lengths = dict(first), 0, [], []
    for step in range(1, updates + 1):
        cut = 0

        def loss(index, logprobs):
            nonlocal cut
            advantage = float(VARIED[index])
            ratio = mx.exp(logprobs - mx.array(old[index]))
            away = mx.array(reference[index]) - logprobs
            policy = mx.minimum(ratio * advantage, mx.minimum(mx.maximum(ratio, 0.99), 1.2) * advantage)
            seen = np.exp(np.array(mx.stop_gradient(naive_logprobs(model, group, index))) - old[index])
            cut += int(((seen < 0.99) & (advantage < 0)).sum() + ((seen > 1.2) & (advantage > 0)).sum())
            return (BETA * (mx.exp(away) - away - 1) - policy).mean() / count

        gradient = {name: array / groups for name, array in naive_gradient(model, group, loss).items()}
        length = np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in gradient.values()))
        for name, array in gradient.items():
            array = array * min(1.0, CUT / length)
            first[name] = 0.9 * first[name] + 0.1 * array
            second[name] = 0.999 * second[name] + 0.001 * array**2
            move = (first[name] / (1 - 0.9**step)) / (np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8)
            weights = {**weights, name: weights[name] * (1 - RATE * DECAY) - RATE * move}
        put(model, weights)
        shares.append(cut / sum(len(one) for one in old))
        lengths.append(length)
    put(model, begun)
    return weights, shares, lengths


@pytest.mark.parametrize("updates", [1, 3])
def test_updates_are_those_of_the_naive_loss_and_numpys_adamw(model, tmp_path, updates):
    """One group teaches and one is unanimous: it is skipped, and counts in the mean."""
    groups = [group_of(model, EQUAL, seed=3), group_of(model, VARIED)]
    begun = weights_of(model)
    expected, shares, lengths = naive_updates(model, groups[1].rollout, len(groups), updates)
    found = updater_of(model, tmp_path, num_iterations=updates).update(groups, RATE)
    assert found.stats[0] is None
    assert found.grad_norm == pytest.approx(lengths[0], rel=1e-4)
    assert lengths[0] > CUT
    away = np.concatenate([(array - expected[name]).ravel() for name, array in weights_of(model).items()])
    moved = np.concatenate([(expected[name] - begun[name]).ravel() for name in begun])
    assert np.linalg.norm(away) < 1e-4 * np.linalg.norm(moved)
    assert found.stats[1].ratio_mean == 1.0
    assert shares[0] == 0.0
    assert found.stats[1].clip_share == pytest.approx(np.mean(shares), abs=1e-6)
    assert (found.stats[1].clip_share > 0.0) == (updates > 1)


@pytest.mark.parametrize(
    ("settings", "advantages", "truncated", "learns"),
    [
        ({}, VARIED, (), True),
        ({}, EQUAL, (), False),
        ({"skip_zero_advantage": False}, EQUAL, (), True),  # the distance pulls
        ({"skip_zero_advantage": False, "beta": 0.0}, EQUAL, (), False),  # and without it nothing does
        ({"mask_truncated": True}, VARIED, (0, 1, 3), True),
        ({"mask_truncated": True}, VARIED, (0, 1, 2, 3), False),
        ({"mask_truncated": False}, VARIED, (0, 1, 2, 3), True),
    ],
)
def test_groups_without_anything_to_learn_cost_no_pass_and_change_nothing(
    model, tmp_path, monkeypatch, settings, advantages, truncated, learns
):
    passes = []
    whole = policy_update.group_gradient
    monkeypatch.setattr(
        policy_update, "group_gradient", lambda *given, **named: passes.append(1) or whole(*given, **named)
    )
    before = weights_of(model)
    found = updater_of(model, tmp_path, **settings).update([group_of(model, advantages, truncated=truncated)], RATE)
    assert (len(passes) == 1, found.stats[0] is not None, found.grad_norm > 0.0) == (learns, learns, learns)
    after = weights_of(model)
    assert any((after[name] != before[name]).any() for name in before) == learns
