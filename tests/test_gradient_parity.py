"""The gradient of a group against transformers: one completion at a time, in float64, with LoRA spelt out in torch.

Nothing of ours is on that side: vision tower, positions, attention and head are transformers', the loss is written
down here, and torch differentiates it. Only the weights are the same, unpacked where they are quantized.
"""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import FAMILIES, random_media
from groups import difference, flat, stir, tiny_model

from mlxvr.grpo.step.gradient import group_gradient
from mlxvr.grpo.step.lora import attach
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.grpo.step.loss_config import LossConfig
from mlxvr.media.patches import normalise
from mlxvr.model.adapter import LORA_PARTS, find_layers
from mlxvr.model.prompt import build_prompt

torch = pytest.importorskip("torch")

TOLERANCE = 1e-4  # relative, of every array of the gradient; float32 gives 1e-5
SCALE = 1.5
TEMPERATURE = 0.8
MEDIA = (("video", (7, 10, 8), 0.75), ("image", (1, 8, 6), 0.0), ("video", (2, 4, 6), 2.0))
LENGTHS = (30, 1, 270, 4, 2)  # together, alone in several blocks, and one that is never read
ADVANTAGES = np.array([0.7, -1.2, 0.9, -0.6, 0.2], dtype=np.float32)
BETA, LOW, HIGH, LIMIT = 0.3, 0.1, 0.15, 300


class Adapted(torch.nn.Module):
    """A linear module with LoRA, or DoRA, whose lengths' norm is a constant (arXiv 2402.09353, section 4.3)."""

    def __init__(self, weight, bias, layer):
        super().__init__()
        self.weight, self.bias = torch.tensor(weight, dtype=torch.float64), bias
        self.parts = {
            part: torch.tensor(np.array(layer[part]), dtype=torch.float64, requires_grad=True)
            for part in LORA_PARTS
            if part in layer
        }
        self.on = True

    def forward(self, inputs):
        weight = self.weight
        if self.on:
            weight = weight + SCALE * (self.parts["lora_a"] @ self.parts["lora_b"]).T
            if "m" in self.parts:
                weight = weight * (self.parts["m"] / weight.norm(dim=1).detach())[:, None]
        return torch.nn.functional.linear(inputs, weight, self.bias)


def unpacked(module):
    """The weight of a module, quantized or not."""
    if "scales" not in module:
        return np.array(module.weight)
    how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return np.array(mx.dequantize(module.weight, module.scales, module.get("biases"), **how))


class Naive:
    """A group as transformers sees it."""

    def __init__(self, folder, model, prompt, completions):
        from reference import Reference

        self.prompt, self.completions, self.spec = prompt, completions, model.spec
        self.reference = Reference(folder, model.family.name)
        network = self.reference.model.double().requires_grad_(False)
        language = model.network.language_model
        network.model.language_model.embed_tokens.weight.copy_(torch.tensor(unpacked(language.model.embed_tokens)))
        network.lm_head.weight.copy_(torch.tensor(unpacked(language.lm_head)))
        self.layers = {}
        for name, layer in find_layers(model.network).items():
            path, _, last = name.removeprefix("language_model.model.").rpartition(".")
            parent = network.model.language_model.get_submodule(path)
            self.layers[name] = Adapted(unpacked(layer.linear), getattr(parent, last).bias, layer)
            setattr(parent, last, self.layers[name])

    def logprobs(self, index, *, adapted=True):
        """(T,) of one completion, from the whole sequence and all of its logits."""
        for layer in self.layers.values():
            layer.on = adapted
        ids, media = self.completions[index].ids, self.prompt.media
        whole = np.concatenate([self.prompt.ids, ids])
        inputs = self.reference.inputs(whole, media, [normalise(one.patches, self.spec) for one in media])
        inputs |= {name: inputs[name].double() for name in ("pixel_values", "pixel_values_videos")}
        logits = self.reference.model(**inputs).logits[0, len(self.prompt.ids) - 1 : -1] / TEMPERATURE
        return torch.log_softmax(logits, -1)[torch.arange(len(ids)), torch.tensor(ids.astype(np.int64))]

    def gradient(self):
        """What `backward` has left."""
        return {
            f"{name}.{part}": tensor.grad.numpy()
            for name, layer in self.layers.items()
            for part, tensor in layer.parts.items()
        }


@pytest.mark.parity
@pytest.mark.parametrize("how", [{}, {"bits": 4}, {"bits": 8, "dora": True}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_transformers(family, how, tmp_path):
    """At a later update, with clips, a reference policy, a temperature, and a truncated completion left out."""
    model = tiny_model(tmp_path / "m", family, bits=how.get("bits"))
    attach(model, LoraConfig(rank=3, scale=SCALE, dora=how.get("dora", False)), seed=1)
    stir(model, amount=0.08)
    media = [
        random_media(family, kind, grid, second_per_grid=seconds, seed=index)
        for index, (kind, grid, seconds) in enumerate(MEDIA)
    ]
    prompt = build_prompt(model.tokenizer, model.family, model.config, media, "What happens? " * 30)
    assert len(prompt.ids) > 300, "the prompt is cut into blocks"
    rng = np.random.default_rng(2)
    completions = [
        SimpleNamespace(ids=rng.integers(0, 400, length).astype(np.int32), truncated=length == 4) for length in LENGTHS
    ]
    naive = Naive(tmp_path / "m", model, prompt, completions)
    old = np.zeros((len(LENGTHS), max(LENGTHS)), dtype=np.float32)
    loss, away, cut, counted = 0.0, 0.0, 0, sum(LENGTHS) - 4
    for index, completion in enumerate(completions):
        with torch.no_grad():
            reference = naive.logprobs(index, adapted=False)
        now, advantage = naive.logprobs(index), float(ADVANTAGES[index])
        old[index, : len(now)] = now.detach().numpy() + rng.normal(0, 0.2, len(now))
        if completion.truncated:
            continue
        ratio = (now - torch.tensor(old[index, : len(now)])).exp()
        policy = torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)
        distance = (reference - now).exp() - (reference - now) - 1
        one = (BETA * distance - policy).sum() / counted
        one.backward()
        loss, away = loss + one.item(), away + distance.sum().item() / counted
        cut += int((((ratio < 1 - LOW) & (advantage < 0)) | ((ratio > 1 + HIGH) & (advantage > 0))).sum())
    assert 0 < cut < counted
    encoded = SimpleNamespace(
        **{name: getattr(prompt, name) for name in ("ids", "positions", "media_mask", "next_position")},
        features=model.encode(media),
    )
    group = SimpleNamespace(prompt=encoded, completions=completions)
    config = LossConfig(loss_type="bnpo", beta=BETA, epsilon=LOW, epsilon_high=HIGH, mask_truncated=True)
    for checkpoint in (False, True):
        gradient, stats = group_gradient(
            model, group, ADVANTAGES, config=config, temperature=TEMPERATURE, old_logprobs=old, checkpoint=checkpoint
        )
        assert difference(flat(gradient), naive.gradient()) < TOLERANCE
        assert stats.loss == pytest.approx(loss, rel=1e-4)
        assert stats.kl == pytest.approx(away, rel=1e-4)
        assert stats.clip_share == pytest.approx(cut / counted)
