"""The prefix of a prompt, shared by all questions about a clip and computed once.

System prompt and media come first in every prompt, so their keys and values are the same for every question. A `Prefix`
computes them once; each question rewinds the cache to the prefix's end and computes only its own text. Rewinding costs
nothing: the next tokens overwrite those of the last question.

A prefix can be saved and loaded. A loaded prefix knows the shapes of its media but not the pixels; this is enough for
any question.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvr.errors import ConfigError
from mlxvr.media import VisionInput
from mlxvr.model import cache as kv
from mlxvr.model.decode import prefill
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt
from mlxvr.runtime.hooks import Progress, ShouldStop

__all__ = ["Prefix", "PrefixCost"]


@dataclass(frozen=True)
class PrefixCost:
    """Seconds spent on computing a prefix."""

    vision_seconds: float
    prefill_seconds: float


@dataclass
class Prefix:
    """Keys and values of a prompt's shared part; `cache` may hold a question's tokens after it.

    Attributes:
        media: shapes and times of the media, without their patches.
        cache: one KV cache per layer.
        ids: int32 (length,), the tokens of the prefix.
    """

    media: tuple[VisionInput, ...]
    cache: list[Any]
    ids: np.ndarray

    @property
    def length(self) -> int:
        """Number of tokens in the prefix."""
        return len(self.ids)

    @classmethod
    def compute(
        cls,
        network: VideoModel,
        prompt: Prompt,
        *,
        kv_bits: int | None = None,
        step_size: int = 2048,
        progress: Progress | None = None,
        should_stop: ShouldStop | None = None,
    ) -> tuple["Prefix", PrefixCost]:
        """Run the vision tower over a prompt's media and the language model over its shared part."""
        started = time.perf_counter()
        features = network.encode(prompt.media, progress=progress, should_stop=should_stop) if prompt.media else None
        encoded = time.perf_counter()
        cache = network.make_cache(kv_bits)
        end = prompt.prefix_length
        if end:  # without media, questions share nothing
            prefill(
                network,
                prompt.ids[:end],
                prompt.positions[:, :end],
                cache,
                features=features,
                media_mask=prompt.media_mask[:end],
                step_size=step_size,
                progress=progress,
                should_stop=should_stop,
            )
        media = tuple(_without_patches(medium) for medium in prompt.media)
        prefix = cls(media, cache, prompt.ids[:end].copy())
        return prefix, PrefixCost(encoded - started, time.perf_counter() - encoded)

    def extend(
        self,
        network: VideoModel,
        prompt: Prompt,
        *,
        step_size: int = 2048,
        should_stop: ShouldStop | None = None,
    ) -> mx.array:
        """Rewind to the prefix and compute the rest of `prompt`; return its last logits, (vocab,), evaluated."""
        start = self.length
        if not np.array_equal(prompt.ids[:start], self.ids):
            raise ConfigError("the prompt does not begin with the clip's prefix: open the clip again")
        kv.trim(self.cache, start)
        logits = prefill(
            network,
            prompt.ids[start:],
            prompt.positions[:, start:],
            self.cache,
            step_size=step_size,
            should_stop=should_stop,
        )
        mx.eval(logits)
        return logits

    def save(self, path: Path, network: VideoModel, settings: Mapping[str, object]) -> None:
        """Write the prefix as safetensors, atomically.

        `settings` are the values besides the model that it depends on: name -> value, JSON-ready.
        """
        kv.trim(self.cache, self.length)
        notes = {
            "model": network.parts,
            "settings": {**_computed_with(network, getattr(self.cache[0], "bits", None)), **settings},
            "ids": self.ids.tolist(),
            "media": [_described(medium) for medium in self.media],
        }
        kv.save(self.cache, path, {name: json.dumps(note) for name, note in notes.items()})

    @classmethod
    def load(
        cls, path: Path, network: VideoModel, settings: Mapping[str, object], *, kv_bits: int | None = None
    ) -> "Prefix":
        """Read a file of `save`.

        Raises `ConfigError` if it is damaged or no saved prefix, or was saved with another model, adapter, dtype,
        `kv_bits` or other `settings`; the message names all differences.
        """
        cache, notes = kv.load(path)
        try:
            model, saved, ids, media = (json.loads(notes[name]) for name in ("model", "settings", "ids", "media"))
            restored = cls(tuple(_undescribed(medium) for medium in media), cache, np.array(ids, np.int32))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is no saved clip, or an older version's: write one with Clip.save") from error
        here = {**_computed_with(network, kv_bits), **json.loads(json.dumps(settings))}
        differing = [name for name in ("model", "adapter") if model.get(name, "") != network.parts.get(name, "")]
        differing += [
            f"{name} ({_short(saved.get(name))} in the file, {_short(here.get(name))} here)"
            for name in sorted(saved.keys() | here.keys())
            if saved.get(name) != here.get(name)
        ]
        if differing:
            raise ConfigError(
                f"{path} was saved with another {', '.join(differing)}: load the model as it was then, or open the "
                "clip itself"
            )
        shapes = {(layer.offset, *_heads(layer)) for layer in cache}
        if len(cache) != len(network.layers) or shapes != {(len(restored.ids), *network.key_shape)}:
            raise ConfigError(
                f"{path} is damaged: its keys and values are not those of its tokens; save the clip again"
            )
        return restored


def _computed_with(network: VideoModel, kv_bits: int | None) -> dict[str, Any]:
    """The settings besides weights and prompt that keys and values depend on."""
    return {"dtype": str(network.dtype).removeprefix("mlx.core."), "kv_bits": kv_bits}


def _heads(layer: Any) -> tuple[int, int]:
    """Number and size of the heads of keys in a layer's cache."""
    if hasattr(layer, "bits"):
        return int(layer.keys[0].shape[1]), int(layer.keys[1].shape[3]) * int(layer.group_size)
    return int(layer.keys.shape[1]), int(layer.keys.shape[3])


def _described(medium: VisionInput) -> dict[str, Any]:
    """A medium without its patches, JSON-ready."""
    return {field.name: getattr(medium, field.name) for field in fields(medium) if field.name != "patches"}


def _undescribed(description: Mapping[str, Any]) -> VisionInput:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in description.items()
    }
    return VisionInput(patches=np.empty((0, 0), np.uint8), **values)


def _short(value: object) -> str:
    text = "none" if value is None else " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def _without_patches(medium: VisionInput) -> VisionInput:
    return replace(medium, patches=medium.patches[:0])
