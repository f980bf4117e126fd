"""The objective against torch, against numbers worked out by hand, and its limits."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlxvr.errors import ConfigError
from mlxvr.grpo.step.loss import advantages, objective
from mlxvr.grpo.step.loss_config import IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES, LossConfig

G, T = 5, 7


@pytest.fixture
def group() -> dict[str, np.ndarray]:
    """Log-probs so far apart that both clips act, under advantages of both signs; none of the last one count."""
    rng = np.random.default_rng(1)
    mask = np.arange(T) < np.array([7, 1, 4, 6, 0])[:, None]
    drawn = {"logprobs": 1.0, "old": 0.5, "reference": 0.7}
    found = {name: np.where(mask, -np.abs(rng.normal(0, wide, (G, T))), 0.0) for name, wide in drawn.items()}
    return {**found, "advantages": np.array([0.9, -1.2, 0.4, -0.5, 1.1]), "mask": mask}


def run(group: dict[str, np.ndarray], config: LossConfig, *, reference: bool = True):
    """Loss, statistics and the gradient in the log-probs."""
    arrays = {
        name: mx.array(array.astype(np.float32 if array.dtype != bool else bool)) for name, array in group.items()
    }

    def loss(logprobs: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        given = arrays["reference"] if reference else None
        return objective(logprobs, arrays["old"], given, arrays["advantages"], arrays["mask"], config)

    (value, stats), gradient = mx.value_and_grad(loss)(arrays["logprobs"])
    return float(value), {name: float(stat) for name, stat in stats.items()}, np.array(gradient)


@pytest.mark.parity
@pytest.mark.parametrize("clips", [(0.2, 0.2), (0.1, 0.5), (0.4, 0.05)])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_values_and_gradients_equal_torchs(group, loss_type, level, beta, clips):
    """The formulas of TRL's trainer, a completion at a time, in float64."""
    torch = pytest.importorskip("torch")
    logprobs = torch.tensor(group["logprobs"], requires_grad=True)
    low, high = clips
    sums, counts, clipped, away = [], [], 0, 0.0
    for row in range(G):
        count = int(group["mask"][row].sum())
        now, old, reference = (
            one[row, :count] for one in (logprobs, torch.tensor(group["old"]), torch.tensor(group["reference"]))
        )
        log_ratio = now - old
        if level == "sequence" and count:
            log_ratio = log_ratio.mean().repeat(count)
        ratio, advantage = log_ratio.exp(), float(group["advantages"][row])
        policy = -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        kl = (reference - now).exp() - (reference - now) - 1
        sums.append((policy + beta * kl).sum())
        counts.append(count)
        clipped += int((((ratio < 1 - low) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))).sum())
        away += float(kl.detach().sum())
    if loss_type == "grpo":
        expected = sum(one / max(count, 1) for one, count in zip(sums, counts)) / G
    elif loss_type == "bnpo":
        expected = sum(sums) / sum(counts)
    else:
        expected = sum(sums) / (G * 11)
    expected.backward()
    config = LossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon=low,
        epsilon_high=high,
        max_completion_tokens=11,
    )
    value, stats, gradient = run(group, config)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, logprobs.grad.numpy(), rtol=1e-4, atol=1e-7)
    assert stats["clip_share"] == pytest.approx(clipped / sum(counts))
    assert 0 < clipped < sum(counts)
    assert stats["kl"] == pytest.approx(away / sum(counts), rel=1e-5)
    assert stats["entropy"] == pytest.approx(-group["logprobs"].sum() / sum(counts), rel=1e-5)


def test_two_tokens_by_hand():
    """A policy with one number x: p("a") = sigmoid(x). "a" earns 1, "b" earns 0.

    std of (1, 0) with n - 1 is 0.70711, so A = 0.5 / 0.70721 = 0.70701 and -0.70701. d log p(a) / dx = 1 - p and
    d log p(b) / dx = -p. With ratio 1 the loss' gradient is -(A (1 - p) + (-A)(-p)) / 2 = -A / 2 for any x.
    The reference says x = 0: with d = log p_ref - log p, d k3 / dx = (1 - exp(d)) dlogp/dx.
    At x = log 3: p = 0.75, exp(d) = 0.5 / 0.75 = 2/3 for "a" and 0.5 / 0.25 = 2 for "b", so the gradient of the
    KL term is (0.25 (1 - 2/3) + (-0.75)(1 - 2)) / 2 = 5/12.
    """
    given = advantages(np.array([1.0, 0.0]))
    assert given.tolist() == pytest.approx([0.70701, -0.70701], abs=1e-5)

    def loss(x: mx.array, beta: float) -> mx.array:
        logprobs = mx.stack([-mx.logaddexp(0.0, -x), -mx.logaddexp(0.0, x)])[:, None]
        reference = mx.full((2, 1), math.log(0.5))
        config = LossConfig(beta=beta)
        old = mx.stop_gradient(logprobs)
        return objective(logprobs, old, reference, mx.array(given), mx.ones((2, 1), mx.bool_), config)[0]

    for beta in (0.0, 0.1):
        gradient = mx.grad(loss)(mx.array(math.log(3)), beta)
        assert float(gradient) == pytest.approx(-0.70701 / 2 + beta * 5 / 12, abs=1e-5)


def test_sequence_ratios_by_hand():
    """Log ratios (0.3, 0.1) and (-0.5): exp(0.2) = 1.2214 is cut to 1.2, exp(-0.5) = 0.6065 under A = 1 is not."""
    logprobs = mx.array([[-0.7, -0.9], [-1.5, 0.0]])
    old = mx.array([[-1.0, -1.0], [-1.0, 0.0]])
    mask = mx.array([[True, True], [True, False]])
    config = LossConfig(importance_sampling_level="sequence", beta=0.0)
    loss, stats = objective(logprobs, old, None, mx.array([1.0, 1.0]), mask, config)
    assert float(loss) == pytest.approx(-(1.2 + 0.60653) / 2, abs=1e-5)
    assert float(stats["clip_share"]) == pytest.approx(2 / 3)
    assert float(stats["ratio_mean"]) == pytest.approx((2 * 1.22140 + 0.60653) / 3, abs=1e-5)
    assert float(stats["kl"]) == 0.0


def test_how_losses_weigh_lengths():
    """One completion of one token, one of three, all ratios 1: -(A1 + A2) / 2, -(A1 + 3 A2) / 4, -(A1 + 3 A2) / 20."""
    logprobs, mask = mx.full((2, 3), -1.0), mx.array([[True, False, False], [True, True, True]])
    for loss_type, expected in [("grpo", -(2 - 1) / 2), ("bnpo", -(2 - 3) / 4), ("dr_grpo", -(2 - 3) / 20)]:
        config = LossConfig(loss_type=loss_type, beta=0.0, max_completion_tokens=10)
        loss, _ = objective(logprobs, logprobs, None, mx.array([2.0, -1.0]), mask, config)
        assert float(loss) == pytest.approx(expected), loss_type


def test_a_completion_without_tokens_counts_in_the_mean():
    """A1 = 2 and A2 = -1, of which only the first has tokens: -(2 + 0) / 2."""
    logprobs, mask = mx.full((2, 3), -1.0), mx.array([[True, True, False], [False, False, False]])
    config = LossConfig(loss_type="grpo", beta=0.0)
    loss, _ = objective(logprobs, logprobs, None, mx.array([2.0, -1.0]), mask, config)
    assert float(loss) == pytest.approx(-1.0)


@pytest.mark.parametrize(("low", "high", "share"), [(0.1, 0.5, 1 / 4), (0.5, 0.1, 1 / 4), (0.1, 0.1, 2 / 4)])
def test_each_clip_cuts_on_its_own_side(low, high, share):
    """Ratios of 0.8 and 1.3 under both signs: a clip cuts 0.8 where A < 0 and 1.3 where A > 0, if it is narrow."""
    ratios, gains = np.array([0.8, 0.8, 1.3, 1.3]), mx.array([-1.0, 1.0, -1.0, 1.0])
    config = LossConfig(epsilon=low, epsilon_high=high, beta=0.0)
    now, old = mx.array(np.log(ratios), dtype=mx.float32)[:, None], mx.zeros((4, 1))
    _, stats = objective(now, old, None, gains, mx.ones((4, 1), mx.bool_), config)
    assert float(stats["clip_share"]) == pytest.approx(share)


def test_no_step_no_distance(group):
    same = {**group, "old": group["logprobs"], "reference": group["logprobs"]}
    _, stats, gradient = run(same, LossConfig(beta=0.5))
    assert (stats["kl"], stats["ratio_mean"], stats["clip_share"]) == (0.0, 1.0, 0.0)
    assert np.abs(gradient).max() > 0.01


def test_what_does_not_count_does_not_matter(group):
    config = LossConfig(beta=0.3)
    expected = run(group, config)
    for name in ("logprobs", "old", "reference"):
        other = {**group, name: np.where(group["mask"], group[name], 50.0)}
        value, stats, gradient = run(other, config)
        assert (value, stats) == expected[:2]
        np.testing.assert_array_equal(gradient, expected[2])
        assert not gradient[~group["mask"]].any()


def test_nothing_counts(group):
    value, stats, gradient = run({**group, "mask": np.zeros((G, T), dtype=bool)}, LossConfig(beta=0.3))
    assert value == 0.0
    assert not any(stats.values())
    assert not gradient.any()


def test_kl_is_never_negative():
    """exp(d) - d - 1 in float32 is -6e-8 for some small d."""
    away = np.linspace(-2e-3, 2e-3, 4001)[None]
    group = {"logprobs": np.zeros_like(away), "reference": away, "old": away * 0}
    for column in range(0, 4001, 400):
        one = {name: array[:, column : column + 1] for name, array in group.items()}
        _, stats, _ = run({**one, "advantages": np.zeros(1), "mask": np.ones((1, 1), bool)}, LossConfig(beta=1.0))
        assert stats["kl"] == pytest.approx(float(away[0, column]) ** 2 / 2, rel=1e-2)
        assert stats["kl"] >= 0.0


def test_the_reference_is_needed(group):
    with pytest.raises(ValueError, match="reference policy"):
        run(group, LossConfig(beta=0.1), reference=False)
    assert run(group, LossConfig(beta=0.0), reference=False)[1]["kl"] == 0.0


@pytest.mark.parametrize(
    ("rewards", "scale", "expected"),
    [
        ([1.0, 2.0, 3.0], True, [-1 / 1.0001, 0.0, 1 / 1.0001]),
        ([1.0, 2.0, 3.0], False, [-1.0, 0.0, 1.0]),
        ([2.3, 2.3, 2.3], True, [0.0, 0.0, 0.0]),
        ([0.1] * 7, False, [0.0] * 7),
        ([1.3], True, [0.0]),
        ([0.0, 0.0, 0.0, 2.0], True, [-0.49995, -0.49995, -0.49995, 1.49985]),
        ([0.501, 0.500], False, [0.0005, -0.0005]),  # intervals that differ by little
        ([0.501, 0.500], True, [0.619497, -0.619497]),  # 0.0005 / (0.001 / sqrt(2) + 0.0001)
    ],
)
def test_advantages_by_hand(rewards, scale, expected):
    found = advantages(np.array(rewards), scale=scale)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if len(set(rewards)) == 1:
        assert not found.any()


def test_rewards_that_differ_by_little_teach():
    """Two intervals whose overlaps differ by half a percent are not equal: IoU rewards come as close as that."""
    for scale in (True, False):
        found = advantages(np.array([0.700, 0.705, 0.700]), scale=scale)
        assert found[1] > 0 > found[0]
    expected = np.array([-1, 2, -1]) * 0.005 / 3 / (np.std([0.700, 0.705, 0.700], ddof=1) + 1e-4)
    np.testing.assert_allclose(advantages(np.array([0.700, 0.705, 0.700])), expected, rtol=1e-4)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_rewards_that_are_no_numbers(wrong):
    with pytest.raises(ValueError, match="not all finite"):
        advantages(np.array([1.0, wrong]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "ppo"}, "use one of grpo, bnpo, dr_grpo"),
        ({"importance_sampling_level": "word"}, "use one of token, sequence"),
        ({"epsilon": 1.1}, "epsilon"),
        ({"epsilon_high": -0.1}, "epsilon_high"),
        ({"epsilon_high": float("nan")}, "epsilon_high"),
        ({"beta": -1.0}, "beta"),
        ({"loss_type": "dr_grpo"}, "max_completion_tokens: set it"),
        ({"max_completion_tokens": 0}, "give at least 1"),
    ],
)
def test_values_that_cannot_be_used(options, words):
    with pytest.raises(ConfigError, match=words):
        LossConfig(**options)


def test_one_epsilon_clips_on_both_sides():
    """As in TRL, where `epsilon_high` is None by default and stands for `epsilon`."""
    assert LossConfig(epsilon=0.25).clip_range == (0.75, 1.25)
    assert LossConfig(epsilon=0.25, epsilon_high=0.5).clip_range == (0.75, 1.5)
    assert LossConfig(epsilon=0.25, epsilon_high=0.0).clip_range == (0.75, 1.0)
    assert LossConfig().clip_range == (0.8, 1.2)
