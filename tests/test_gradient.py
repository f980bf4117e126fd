"""The packed gradient against the naive one: one completion at a time, through the plain network, with no packing."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import FAMILIES
from groups import NOTHING, difference, flat, make_group, stir, tiny_model
from mlx.utils import tree_flatten

from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.data.rows import Row
from mlxvr.errors import ConfigError
from mlxvr.grpo.step import forward
from mlxvr.grpo.step.forward import completion_logprobs
from mlxvr.grpo.step.gradient import group_gradient, group_logprobs
from mlxvr.grpo.step.lora import adapter_state, attach, lora_weights
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.grpo.step.loss_config import IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES, LossConfig
from mlxvr.grpo.step.packing import pack
from mlxvr.grpo.step.prompts import EncodedPrompt
from mlxvr.grpo.step.rollout import rollout
from mlxvr.model.network import VideoModel

TOLERANCE = 1e-4  # relative, of every array of the gradient; float32 gives 3e-6
ADVANTAGES = np.array([0.8, -1.3, 0.6, -0.4], dtype=np.float32)


def naive_logprobs(model: VideoModel, group: SimpleNamespace, index: int, temperature: float = 1.0) -> mx.array:
    """(T_i,) of one completion, from the whole sequence and all of its logits."""
    prompt, ids = group.prompt, group.completions[index].ids
    after = np.tile(prompt.next_position + np.arange(len(ids)), (3, 1))
    hidden = model.hidden(
        mx.array(np.concatenate([prompt.ids, ids]))[None],
        mx.array(np.concatenate([prompt.positions, after], axis=1).astype(np.int32))[:, None],
        features=prompt.features,
        media_mask=np.concatenate([prompt.media_mask, np.zeros(len(ids), dtype=bool)])[None],
    )
    logits = model.logits(hidden[0]).astype(mx.float32) / temperature
    before = logits[len(prompt.ids) - 1 : -1]
    return mx.log(mx.softmax(before, axis=-1))[mx.arange(len(ids)), mx.array(ids)]


def naive_gradient(
    model: VideoModel,
    group: SimpleNamespace,
    per_completion: Callable[[int, mx.array], mx.array],
    temperature: float = 1.0,
) -> dict[str, np.ndarray]:
    """The gradient of the sum of `per_completion(index, logprobs)`, one backward pass for each completion."""
    total: dict[str, np.ndarray] = {}
    for index in range(len(group.completions)):

        def loss(_: None, index: int = index) -> mx.array:
            return per_completion(index, naive_logprobs(model, group, index, temperature))

        kept = model.network.trainable_parameters()
        _, gradient = nn.value_and_grad(model.network, loss)(None)
        model.network.update(kept)
        total = {name: total.get(name, 0.0) + array for name, array in flat(gradient).items()}
    return total


def policy_gradient(model: VideoModel, group: SimpleNamespace, temperature: float = 1.0) -> dict[str, np.ndarray]:
    """Of plain on-policy GRPO: mean over completions of the mean of A * grad log p."""

    def loss(index: int, logprobs: mx.array) -> mx.array:
        return -float(ADVANTAGES[index]) * logprobs.mean() / len(group.completions)

    return naive_gradient(model, group, loss, temperature)


def trained(folder: Path, family: str, *, bits: int | None = None, tied: bool = False, **lora) -> VideoModel:
    model = tiny_model(folder, family, bits=bits, tied=tied)
    attach(model, LoraConfig(rank=4, **lora), seed=1)
    stir(model)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VideoModel:
    return trained(tmp_path_factory.mktemp("gradient") / "m", request.param)


@pytest.fixture(scope="module")
def group(model: VideoModel) -> SimpleNamespace:
    return make_group(model)


@pytest.fixture(scope="module")
def expected(model: VideoModel, group: SimpleNamespace) -> dict[str, np.ndarray]:
    return policy_gradient(model, group)


def spread(group: SimpleNamespace, seed: int, wide: float) -> np.ndarray:
    """Made-up differences between two policies' log-probs: (G, T)."""
    longest = max(len(one.ids) for one in group.completions)
    return np.random.default_rng(seed).normal(0, wide, (len(group.completions), longest)).astype(np.float32)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("scores_at_once", [2**25, 2**10])
def test_the_packed_gradient_is_the_naive_one(model, group, expected, checkpoint, scores_at_once, monkeypatch) -> None:
    monkeypatch.setattr(forward, "SCORES_AT_ONCE", scores_at_once)
    weights = lora_weights(model)
    gradient, stats = group_gradient(model, group, ADVANTAGES, config=LossConfig(beta=0.0), checkpoint=checkpoint)
    assert [name for name, _ in tree_flatten(gradient)] == [
        name for name, _ in tree_flatten(model.network.trainable_parameters())
    ]
    assert len(expected) == 3 * 7 * 2
    assert all(array is weights[name] for name, array in lora_weights(model).items())  # not what was traced
    assert difference(flat(gradient), expected) < TOLERANCE
    assert stats.loss == pytest.approx(-ADVANTAGES.mean(), abs=1e-6)  # on-policy it says nothing
    assert (stats.ratio_mean, stats.clip_share, stats.kl, stats.tokens) == (1.0, 0.0, 0.0, 18)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [
        {"bits": 4},
        {"dora": True},
        {"bits": 4, "dora": True},
        {"bits": 8, "tied": True},
        {"target_modules": ("v_proj",)},
    ],
    ids=str,
)
def test_quantized_weights_and_other_adapters(family, how, tmp_path) -> None:
    model = trained(tmp_path / "m", family, **how)
    group = make_group(model, seed=4)
    expected = policy_gradient(model, group)
    for checkpoint in (False, True):
        gradient, _ = group_gradient(model, group, ADVANTAGES, config=LossConfig(beta=0.0), checkpoint=checkpoint)
        assert difference(flat(gradient), expected) < TOLERANCE


@pytest.mark.parametrize(
    "media", [[], [("image", (1, 6, 4), 0.0)], [("video", (5, 4, 4), 0.75)]], ids=["text", "image", "video"]
)
def test_every_kind_of_prompt(model, media) -> None:
    group = make_group(model, media=media, lengths=(2, 6, 4, 4), seed=2)
    gradient, _ = group_gradient(model, group, ADVANTAGES, config=LossConfig(beta=0.0), checkpoint=True)
    assert difference(flat(gradient), policy_gradient(model, group)) < TOLERANCE


@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_later_update_with_clips_and_a_reference(model, group, loss_type, level) -> None:
    """Every loss, where the policy is no longer the one that sampled; truncated completions are left out."""
    now = group_logprobs(model, group)
    old, reference = now + spread(group, 5, 0.3), now + spread(group, 6, 0.4)
    group = SimpleNamespace(
        prompt=group.prompt, completions=tuple(SimpleNamespace(**vars(one)) for one in group.completions)
    )
    group.completions[3].truncated = True
    tokens = 5 + 1 + 9

    def loss(index: int, logprobs: mx.array) -> mx.array:
        if index == 3:
            return mx.array(0.0) * logprobs.sum()
        length, advantage = logprobs.shape[0], float(ADVANTAGES[index])
        ratios = mx.exp(logprobs - mx.array(old[index, :length]))
        if level == "sequence":
            ratios = mx.full((length,), 1.0) * mx.exp((logprobs - mx.array(old[index, :length])).mean())
        away = mx.array(reference[index, :length]) - logprobs
        policy = mx.minimum(ratios * advantage, mx.minimum(mx.maximum(ratios, 0.9), 1.15) * advantage)
        each = -policy + 0.2 * (mx.exp(away) - away - 1)
        return each.sum() / {"grpo": 4 * length, "bnpo": tokens, "dr_grpo": 4 * 20}[loss_type]

    config = LossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon=0.1,
        epsilon_high=0.15,
        beta=0.2,
        mask_truncated=True,
        max_completion_tokens=20,
    )
    gradient, stats = group_gradient(
        model, group, ADVANTAGES, config=config, old_logprobs=old, reference_logprobs=reference
    )
    assert difference(flat(gradient), naive_gradient(model, group, loss)) < TOLERANCE
    assert stats.tokens == tokens
    assert stats.kl > 0.01
    if level == "token":
        assert 0.0 < stats.clip_share < 1.0


def test_the_gradient_flows_through_the_shared_prompt(model, group, expected) -> None:
    """If the prompt's keys and values were held fixed, most of the gradient would be gone."""
    packed = pack(group.prompt, [one.ids for one in group.completions])

    def loss(_: None) -> mx.array:
        cache = model.make_cache()
        length = len(group.prompt.ids)
        model.hidden(
            mx.array(packed.ids[:length])[None],
            mx.array(packed.positions[:, :length])[:, None],
            cache=cache,
            features=group.prompt.features,
            media_mask=packed.media_mask[None, :length],
        )
        ids = group.completions[2].ids
        for layer in cache:
            layer.keys, layer.values = mx.stop_gradient(layer.keys), mx.stop_gradient(layer.values)
        after = np.tile(group.prompt.next_position + np.arange(len(ids)), (3, 1, 1)).astype(np.int32)
        hidden = model.hidden(mx.array(ids)[None], mx.array(after), cache=cache)
        return nn.losses.cross_entropy(model.logits(hidden[0, :-1]), mx.array(ids[1:])).mean()

    kept = model.network.trainable_parameters()
    held = flat(nn.value_and_grad(model.network, loss)(None)[1])
    model.network.update(kept)

    def only(index: int, logprobs: mx.array) -> mx.array:
        return -logprobs[1:].mean() if index == 2 else mx.array(0.0) * logprobs.sum()

    assert difference(held, naive_gradient(model, group, only)) > 0.05


@pytest.mark.parametrize("tokens_at_once", [1, 7, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_whatever_the_head_computes_at_once(model, group, tokens_at_once, temperature) -> None:
    packed = pack(group.prompt, [one.ids for one in group.completions])
    kwargs = {"temperature": temperature, "tokens_at_once": tokens_at_once}
    found = np.array(completion_logprobs(model, packed, **kwargs))
    assert found.dtype == np.float32
    for index, completion in enumerate(group.completions):
        length = len(completion.ids)
        np.testing.assert_allclose(
            found[index, :length], np.array(naive_logprobs(model, group, index, temperature)), atol=2e-5
        )
        assert not found[index, length:].any()

    def loss(_: None) -> mx.array:
        return (completion_logprobs(model, packed, checkpoint=True, **kwargs) * mx.array(spread(group, 8, 1.0))).sum()

    def naive(index: int, logprobs: mx.array) -> mx.array:
        return (logprobs * mx.array(spread(group, 8, 1.0)[index, : logprobs.shape[0]])).sum()

    kept = model.network.trainable_parameters()
    gradient = flat(nn.value_and_grad(model.network, loss)(None)[1])
    model.network.update(kept)
    assert difference(gradient, naive_gradient(model, group, naive, temperature)) < TOLERANCE


def test_the_reference_is_at_the_temperature_of_the_samples(model, group) -> None:
    """The reference is the policy itself here, so that there is no distance at any temperature."""
    config = LossConfig(beta=0.1)
    reference = adapter_state(model)
    gradient, stats = group_gradient(model, group, ADVANTAGES, config=config, temperature=0.6, reference=reference)
    assert stats.kl == pytest.approx(0.0, abs=1e-9)
    for index, completion in enumerate(group.completions):
        expected = np.array(naive_logprobs(model, group, index, 0.6))
        np.testing.assert_allclose(stats.reference_logprobs[index, : len(completion.ids)], expected, atol=2e-5)
    assert difference(flat(gradient), policy_gradient(model, group, 0.6)) < TOLERANCE


def test_temperature_zero_means_the_models_own_distribution(model, group) -> None:
    np.testing.assert_array_equal(group_logprobs(model, group, temperature=0.0), group_logprobs(model, group))


def test_all_logits_never_exist_at_once(model, group, monkeypatch) -> None:
    rows: list[int] = []
    whole = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (rows.append(hidden.shape[0]), whole(hidden))[1])
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 4 * 512)
    group_gradient(model, group, ADVANTAGES, config=LossConfig(beta=0.0))
    assert rows == [4, 4, 4, 4, 2] * 2  # forward, and again backward: the tokens of the completions and no others


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_the_first_update_the_distance_is_0_and_the_ratio_1(family, bits, dtype, checkpoint, tmp_path) -> None:
    """To the last bit on a CPU, whatever is computed in; also of completions that the model sampled itself."""
    model = tiny_model(tmp_path / "m", family)
    model.network.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model.network.language_model, group_size=32, bits=bits)
    attach(model, LoraConfig(rank=4), seed=1)
    prompt = EncodedPrompt(**{**vars(make_group(model).prompt), "row": Row(id="r", question="?", answer="A")})
    group = rollout(model, prompt, SamplingConfig(max_tokens=12, seed=0, temperature=1.0), group_size=4)
    _, stats = group_gradient(model, group, ADVANTAGES, config=LossConfig(beta=0.1), checkpoint=checkpoint)
    assert stats.kl == pytest.approx(0.0, abs=NOTHING)
    assert (stats.ratio_mean, stats.clip_share) == (1.0, 0.0)
    assert stats.entropy > 1.0


@pytest.mark.parametrize("dora", [False, True])
def test_nothing_has_moved_before_the_first_update(dora, tmp_path) -> None:
    """A new adapter is the reference policy, and the first step goes somewhere."""
    model = tiny_model(tmp_path / "m", "qwen3_vl")
    attach(model, LoraConfig(rank=4, dora=dora), seed=1)
    group = make_group(model)
    gradient, stats = group_gradient(model, group, ADVANTAGES, config=LossConfig(beta=0.1))
    assert stats.kl == pytest.approx(0.0, abs=NOTHING if not dora else max(NOTHING, 1e-10))  # DoRA rounds its lengths
    assert (stats.ratio_mean, stats.clip_share) == (1.0, 0.0)
    assert stats.loss == pytest.approx(-ADVANTAGES.mean(), abs=1e-6)
    assert stats.entropy == pytest.approx(-stats.logprobs.sum() / stats.tokens, rel=1e-5)
    moved = {name for name, array in flat(gradient).items() if array.any()}
    assert moved == {name for name in lora_weights(model) if not name.endswith("lora_a")}  # lora_b is 0


def test_updates_on_one_rollout(model, group) -> None:
    """Two steps: the second knows the first one's log-probs; afterwards everything is as it was."""
    kept = adapter_state(model)
    config = LossConfig(beta=0.1, epsilon_high=0.1)
    first, stats = group_gradient(model, group, ADVANTAGES, config=config)
    assert stats.reference_logprobs is not None
    model.network.load_weights(
        [(name, kept[name] - 0.02 * mx.array(array)) for name, array in flat(first).items()], strict=False
    )
    _, later = group_gradient(
        model,
        group,
        ADVANTAGES,
        config=config,
        old_logprobs=stats.logprobs,
        reference_logprobs=stats.reference_logprobs,
    )
    assert later.ratio_mean != 1.0
    assert later.loss < stats.loss
    for index, advantage in enumerate(ADVANTAGES):
        change = (later.logprobs - stats.logprobs)[index].sum()
        assert (change > 0) == (advantage > 0)
    model.network.load_weights(list(kept.items()), strict=False)
    again, _ = group_gradient(model, group, ADVANTAGES, config=config)
    for name, array in flat(again).items():
        np.testing.assert_array_equal(array, flat(first)[name])


def test_the_reference_may_be_the_adapter_that_training_began_with(model, group) -> None:
    begun = adapter_state(model)
    without, from_start = (
        group_gradient(model, group, ADVANTAGES, config=LossConfig(beta=0.1), reference=start)[1]
        for start in (None, begun)
    )
    assert from_start.kl == pytest.approx(0.0, abs=NOTHING)
    assert without.kl > 1e-3


def test_bfloat16_stays_close(model, group, expected, tmp_path) -> None:
    """Weights in bfloat16, adapters and gradients in float32."""
    other = tiny_model(tmp_path / "m", model.family.name)
    other.network.set_dtype(mx.bfloat16)
    attach(other, LoraConfig(rank=4), seed=1)
    other.network.load_weights(list(lora_weights(model).items()), strict=False)
    gradient, stats = group_gradient(other, group, ADVANTAGES, config=LossConfig(beta=0.0), checkpoint=True)
    assert {array.dtype for _, array in tree_flatten(gradient)} == {mx.float32}
    assert difference(flat(gradient), expected) < 0.05  # 0.027 on an x86 CPU
    assert np.abs(stats.logprobs - group_logprobs(model, group)).max() < 0.04  # 0.020


def test_dropout(tmp_path) -> None:
    """It is there for gradients alone, and layers that are computed again would drop something else."""
    model = trained(tmp_path / "m", "qwen3_vl", dropout=0.5)
    group = make_group(model)
    before = group_logprobs(model, group)
    config = LossConfig(beta=0.0)
    one, again, other = (
        group_gradient(model, group, ADVANTAGES, config=config, seed=seed)[1].logprobs for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(group_logprobs(model, group), before)
    with pytest.raises(ConfigError, match="dropout and gradient checkpointing"):
        group_gradient(model, group, ADVANTAGES, config=config, checkpoint=True)


def test_shapes_that_do_not_fit(model, group) -> None:
    config = LossConfig(beta=0.0)
    with pytest.raises(ValueError, match="advantages for 4 completions"):
        group_gradient(model, group, ADVANTAGES[:3], config=config)
    with pytest.raises(ValueError, match="expected"):
        group_gradient(model, group, ADVANTAGES, config=config, old_logprobs=np.zeros((4, 5), np.float32))


def test_what_cannot_be_trained(tmp_path) -> None:
    model, config = tiny_model(tmp_path / "m", "qwen3_vl"), LossConfig(beta=0.0)
    group = make_group(model)
    with pytest.raises(ConfigError, match=r"vision_tower.* is not frozen"):
        group_gradient(model, group, ADVANTAGES, config=config)
    model.network.freeze()
    with pytest.raises(ConfigError, match="nothing to train"):
        group_gradient(model, group, ADVANTAGES, config=config)
