"""Groups to compute gradients of: a prompt with media, and completions of random tokens.

model = tiny_model(tmp_path / "m", "qwen3_vl", bits=4)
group = make_group(model, lengths=(7, 1, 12))
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxvr.grpo.step.lora import lora_weights
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import build_prompt
from mlxvr.runtime.device_memory import backend

__all__ = ["NOTHING", "difference", "flat", "make_group", "stir", "tiny_model"]

# How far from 0 a distance between equal policies may be: two passes give the same bits on a CPU, and a GPU's products
# may round otherwise from one pass to the next (seen on CUDA: 1e-13 in float32, 2e-5 in bfloat16).
NOTHING = 0.0 if backend() == "cpu" else 1e-4

MEDIA = (("video", (3, 4, 6), 1.0), ("image", (1, 4, 4), 0.0))


def tiny_model(folder: Path, family: str, *, bits: int | None = None, tied: bool = False) -> VideoModel:
    """A random model; its language model quantized to `bits`, embedding and head included."""
    model = load_model(checkpoints.write_checkpoint(folder, family, tied=tied))
    if bits is not None:
        nn.quantize(model.network.language_model, group_size=32, bits=bits)
    return model


def make_group(
    model: VideoModel,
    *,
    lengths: Sequence[int] = (5, 1, 9, 3),
    media: Sequence[tuple[str, tuple[int, int, int], float]] = MEDIA,
    truncated: Sequence[int] = (),
    seed: int = 0,
) -> SimpleNamespace:
    """What a rollout gives: a prompt, and completions of these lengths; those named in `truncated` hit the limit."""
    family = model.family.name
    shown = [
        checkpoints.random_media(family, kind, grid, second_per_grid=seconds, seed=seed + index)
        for index, (kind, grid, seconds) in enumerate(media)
    ]
    prompt = build_prompt(model.tokenizer, model.family, model.config, shown, "What happens?", system="Be brief.")
    encoded = SimpleNamespace(
        row=SimpleNamespace(id="row"),
        ids=prompt.ids,
        positions=prompt.positions,
        media_mask=prompt.media_mask,
        features=model.encode(shown) if shown else None,
        next_position=prompt.next_position,
    )
    rng = np.random.default_rng(seed)
    completions = tuple(
        SimpleNamespace(ids=rng.integers(0, 400, length).astype(np.int32), truncated=index in truncated)
        for index, length in enumerate(lengths)
    )
    return SimpleNamespace(prompt=encoded, completions=completions)


def stir(model: VideoModel, *, amount: float = 0.1, seed: int = 0) -> None:
    """Give every trained weight of a model a random push, as training would."""
    rng = np.random.default_rng(seed)
    pushed = {
        name: array + mx.array(rng.normal(0, amount, array.shape).astype(np.float32))
        for name, array in lora_weights(model).items()
    }
    model.network.load_weights(list(pushed.items()), strict=False)


def flat(gradient: object) -> dict[str, np.ndarray]:
    """A gradient's arrays by name."""
    return {name: np.array(array) for name, array in tree_flatten(gradient)}


def difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest relative difference of any array."""
    assert found.keys() == expected.keys()
    return max(
        float(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name])) for name in expected
    )
