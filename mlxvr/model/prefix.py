"""The part of a prompt that every question about a clip shares, computed once.

System prompt and media come first in every prompt, so their keys and values are the same for every question. A `Prefix`
computes them once; each question rewinds the cache to the prefix's end and computes its own text alone. Rewinding costs
nothing: the cache forgets what came later, and the next tokens are written over it.

A prefix can be saved and loaded. A loaded one knows the shape of its media, not the pixels: enough for any question.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvr.callbacks import Progress, ShouldStop
from mlxvr.errors import ConfigError
from mlxvr.media import VisionInput
from mlxvr.model import cache as kv
from mlxvr.model.decode import prefill
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt

__all__ = ["Prefix", "PrefixCost"]


@dataclass(frozen=True)
class PrefixCost:
    """Seconds that computing a prefix took."""

    vision_seconds: float
    prefill_seconds: float


@dataclass
class Prefix:
    """Keys and values of a prompt's shared part; `cache` may hold a question's tokens after it.

    Attributes:
        media: the shapes and times of the media; their patches are gone.
        cache: one KV cache a layer.
        ids: int32 (length,), the tokens that the prefix holds.
    """

    media: tuple[VisionInput, ...]
    cache: list[Any]
    ids: np.ndarray

    @property
    def length(self) -> int:
        """Tokens in the prefix."""
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
        seen = time.perf_counter()
        cache = network.make_cache(kv_bits)
        end = prompt.prefix_length
        if end:  # without media nothing is shared
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
        media = tuple(_without_patches(one) for one in prompt.media)
        prefix = cls(media, cache, prompt.ids[:end].copy())
        return prefix, PrefixCost(seen - started, time.perf_counter() - seen)

    def extend(
        self,
        network: VideoModel,
        prompt: Prompt,
        *,
        step_size: int = 2048,
        should_stop: ShouldStop | None = None,
    ) -> mx.array:
        """Rewind to the prefix and compute the rest of `prompt`; the logits of its last token, (vocab,), evaluated."""
        start = self.length
        if not np.array_equal(prompt.ids[:start], self.ids):
            raise ConfigError("the prompt does not begin with what the clip holds: open the clip again")
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

    def save(self, path: Path, network: VideoModel) -> None:
        """Write the prefix as safetensors, atomically."""
        kv.trim(self.cache, self.length)
        media = [
            {"kind": one.kind, "grid": one.grid, "seconds": one.seconds, "second_per_grid": one.second_per_grid}
            for one in self.media
        ]
        described = {"model": network.fingerprint, "ids": json.dumps(self.ids.tolist()), "media": json.dumps(media)}
        kv.save(self.cache, path, described)

    @classmethod
    def load(cls, path: Path, network: VideoModel) -> "Prefix":
        """Read what `save` wrote; `ConfigError` if it was written with another model or is no such file."""
        cache, described = kv.load(path)
        if not {"model", "ids", "media"} <= described.keys():
            raise ConfigError(f"{path} is no saved clip: write one with Clip.save")
        if described["model"] != network.fingerprint:
            raise ConfigError(f"{path} was saved with another model: open the clip itself with this one")
        media = tuple(
            VisionInput(
                kind=one["kind"],
                patches=np.empty((0, 0), np.uint8),
                grid=tuple(one["grid"]),
                seconds=tuple(one["seconds"]),
                second_per_grid=one["second_per_grid"],
            )
            for one in json.loads(described["media"])
        )
        return cls(media, cache, np.array(json.loads(described["ids"]), np.int32))


def _without_patches(one: VisionInput) -> VisionInput:
    return VisionInput(one.kind, one.patches[:0], one.grid, one.seconds, one.second_per_grid)
