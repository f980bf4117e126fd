"""The committed reference: results of transformers in float32 on another machine, and the inputs of the computation.

`reference/` beside this file contains

    reference.safetensors   logits, gradients and frames, float32 and uint8
    reference.json          answers, and the releases that computed all of it
    qwen2_5_vl/             a tiny Qwen2.5-VL with random weights and heads of 128 numbers, as in public models

Qwen3-VL is the bundled checkpoint. `tests/hardware/make_reference.py` writes these files. It runs transformers on torch
and takes only weights and tokens from mlxvr: positions, attention, logits and gradients are transformers' own.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.diagnosis.scene import draw_clip, draw_image
from mlxvr.grpo.step.lora import attach, lora_weights
from mlxvr.grpo.step.lora_config import LoraConfig
from mlxvr.media import VisionInput, patchify
from mlxvr.model.loading import load_model
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt, build_prompt
from mlxvr.storage.paths import list_visible

__all__ = [
    "ADVANTAGES",
    "BITS",
    "BUNDLED",
    "FOLDER",
    "GROUP_SIZE",
    "LORA",
    "MODELS",
    "SHOWN",
    "Reference",
    "attach_known_adapter",
    "completions",
    "group",
    "load",
    "open_model",
    "pack",
    "prompt",
    "quantize",
    "unpack",
]

FOLDER = Path(__file__).parent / "reference"
BUNDLED = str(json.loads((demo_folder() / "checkpoint" / "config.json").read_text(encoding="utf-8"))["model_type"])
MODELS = (BUNDLED, *sorted(config.parent.name for config in list_visible(FOLDER, "*/config.json")))
SHOWN = ("clip", "image")
BITS, GROUP_SIZE = 4, 64  # of packed weights
LORA = LoraConfig(rank=2, scale=1.5)
ADVANTAGES = np.array([0.9, -1.1, 0.5, -0.3], dtype=np.float32)
_LENGTHS = (6, 1, 11, 3)
_QUESTION = "Which color does the moving object have?"
_CHOICES = ("orange", "blue", "purple", "green")


@dataclass(frozen=True, eq=False)
class Reference:
    """The committed numbers: `arrays` by name, and `notes`, the JSON beside them."""

    arrays: dict[str, np.ndarray]
    notes: dict[str, Any]

    def gradient(self, kind: str) -> dict[str, np.ndarray]:
        """The gradient's arrays by the names of the LoRA weights; `kind` is "float32" or "4bit"."""
        start = f"gradient.{kind}."
        return {name.removeprefix(start): array for name, array in self.arrays.items() if name.startswith(start)}


@functools.cache
def load() -> Reference:
    """Read the committed files."""
    arrays = cast("dict[str, mx.array]", mx.load(str(FOLDER / "reference.safetensors")))
    notes = json.loads((FOLDER / "reference.json").read_text(encoding="utf-8"))
    return Reference({name: np.array(array) for name, array in arrays.items()}, notes)


def open_model(name: str, *, dtype: str = "float32") -> VideoModel:
    """Load the bundled checkpoint (`BUNDLED`) or a tiny random one (the other names in `MODELS`)."""
    return load_model(demo_folder() / "checkpoint" if name == BUNDLED else FOLDER / name, dtype=dtype)


def prompt(model: VideoModel, shown: str) -> Prompt:
    """The question of all checks, about the drawn "clip" or the drawn "image"."""
    height, width = 4 * model.spec.factor, 5 * model.spec.factor  # multiples of the factor: nothing is resized
    if shown == "clip":
        patches, grid = patchify(draw_clip(height, width), model.spec)
        vision = VisionInput("video", patches, grid, tuple(0.25 + row for row in range(grid[0])), 1.0)
    else:
        patches, grid = patchify(draw_image(height, width)[None], model.spec)
        vision = VisionInput("image", patches, grid, (), 0.0)
    return build_prompt(model.tokenizer, model.family, model.config, [vision], _QUESTION, options=_CHOICES)


def quantize(model: VideoModel) -> None:
    """Pack the language model to 4 bits, in place.

    numpy packs the numbers: `mx.quantize` rounds differently on different backends, and only the computation with
    packed weights is tested here.
    """
    packed = {
        path: pack(np.array(module.weight.astype(mx.float32)))
        for path, module in model.network.language_model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    nn.quantize(model.network.language_model, group_size=GROUP_SIZE, bits=BITS)
    dtype = model.layers[0].input_layernorm.weight.dtype
    for path, module in model.network.language_model.named_modules():
        if path in packed:
            numbers, scales, biases = packed[path]
            module.weight = mx.array(numbers)
            module.scales, module.biases = mx.array(scales).astype(dtype), mx.array(biases).astype(dtype)


def pack(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Affine packing by its definition, per group: round((w - least) / step), with 15 steps from least to most.

    float32 (rows, columns) -> uint32 (rows, columns / 8), the lowest bits first; step and least, float32
    (rows, columns / 64).
    """
    groups = weight.reshape(len(weight), -1, GROUP_SIZE)
    least, most = groups.min(axis=2), groups.max(axis=2)
    step = np.maximum((most - least) / np.float32(2**BITS - 1), np.float32(1e-8))
    numbers = np.rint((groups - least[..., None]) / step[..., None]).astype(np.uint32)
    places = numbers.reshape(len(weight), -1, 32 // BITS) << (np.arange(32 // BITS, dtype=np.uint32) * np.uint32(BITS))
    return np.bitwise_or.reduce(places, axis=2), step, least


def unpack(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """Affine unpacking by its definition: numbers of `bits` bits, lowest first, times scale, plus bias."""
    per_word = 32 // bits
    shifts = (np.arange(per_word) * bits).astype(np.uint32)
    numbers = ((packed[..., None] >> shifts) & np.uint32(2**bits - 1)).reshape(*packed.shape[:-1], -1)
    grouped = numbers.reshape(*scales.shape, -1).astype(np.float32)
    return (grouped * scales[..., None] + biases[..., None]).reshape(numbers.shape)


def attach_known_adapter(model: VideoModel) -> None:
    """Add LoRA layers with weights that are the same on every machine (numpy's frozen generator)."""
    attach(model, LORA, seed=0)
    random = np.random.RandomState(7)
    weights = {
        name: mx.array(random.normal(0.0, 0.08, array.shape).astype(np.float32))
        for name, array in sorted(lora_weights(model).items())
    }
    model.network.load_weights(list(weights.items()), strict=False)


def completions() -> list[np.ndarray]:
    """Four completions of random tokens, with different lengths."""
    random = np.random.RandomState(3)
    return [random.randint(20, 700, length).astype(np.int32) for length in _LENGTHS]


def group(model: VideoModel, asked: Prompt, ids: Sequence[np.ndarray] | None = None) -> SimpleNamespace:
    """A prompt and its completions, in the form of a rollout."""
    encoded = SimpleNamespace(
        row=None,
        ids=asked.ids,
        positions=asked.positions,
        media_mask=asked.media_mask,
        features=model.encode(asked.media),
        next_position=asked.next_position,
    )
    answers = tuple(SimpleNamespace(ids=answer, truncated=False) for answer in (ids or completions()))
    return SimpleNamespace(prompt=encoded, completions=answers)
