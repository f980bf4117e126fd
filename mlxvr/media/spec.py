"""What a checkpoint expects of its pictures: patch geometry, colour statistics, sampling rate and token limits.

A checkpoint says this in up to three files (`config.json`, `preprocessor_config.json`,
`video_preprocessor_config.json`), spelled in more than one way, and leaves some of it to the code that fed the model in
training (qwen-vl-utils). `VisionSpec.from_files` reads them once; everything after it works with plain numbers. What
differs between families of models is data for it, `FrameRules`.

Token limits. Processor files bound what the processor can produce: for Qwen2.5-VL a video frame may have 4 to 16,384
tokens, far wider than the 16 to 768 that VideoAuto-R1 was trained with. The default is the range in which both hold; if
they have nothing in common, the file wins. `with_overrides` sets anything else.

An image is limited to 4,096 tokens (2,048 x 2,048 pixels at 32 pixels per side of a token, so a full HD screen loses
nothing), a quarter of the limit in training, unless `image_max_tokens` sets another limit. A photo of 12 megapixels
takes 11,844 tokens of Qwen3-VL, and the cost grows faster than the number: for the 8B checkpoint, 3e14 operations in
the tower instead of 5e13, and 1.7 GB of keys and values instead of 0.6, which do not fit beside the weights on a Mac
with 16 GB.

One token covers `factor x factor` pixels of a picture (factor = patch * merge); in a video it also covers
`temporal_patch_size` frames, but limits of a frame count the tokens of that frame alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Self

from mlxvr.errors import CheckpointError, ConfigError

__all__ = ["SAMPLE_BY", "FrameRules", "VisionSpec"]

SAMPLE_BY = ("time", "index")

# Limits of VideoAuto-R1's training and evaluation, in tokens (Appendix and public scripts).
_FRAME_TOKENS = (16, 768)
_IMAGE_TOKENS = (128, 4_096)  # trained and evaluated with up to 16,384: see above
_VIDEO_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class FrameRules:
    """Defaults for values that a family's processor files leave out, and how its files count pixels.

    Attributes:
        patch_size: pixels per side of a patch.
        mean, std: mean and standard deviation of RGB in [0, 1].
        counts_whole_clip: whether the video processor's pixel range counts the pixels of all frames of a clip together,
            and `max_video_tokens` (transformers 5.22 and later) those of a frame; else the range is for one frame.
    """

    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    counts_whole_clip: bool


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """How pictures are sampled, sized and cut for one checkpoint.

    Raises `ConfigError` if a value cannot be used.
    """

    patch_size: int  # pixels per side of a patch
    merge_size: int  # patches per side of a token
    temporal_patch_size: int = 2  # frames per patch
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    fps: float = 2.0  # frames to sample per second of source time
    sample_by: str = "time"  # or "index": frames are spread over time or over indices (they differ at a variable rate)
    min_frames: int = 4  # the least frames to sample from a clip, unless it has fewer
    max_frames: int = 768
    frame_min_tokens: int = _FRAME_TOKENS[0]  # of one video frame
    frame_max_tokens: int = _FRAME_TOKENS[1]
    video_tokens: int = _VIDEO_TOKENS  # the most of a whole clip
    image_min_tokens: int = _IMAGE_TOKENS[0]
    image_max_tokens: int = _IMAGE_TOKENS[1]

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}: give a whole number of at least 1")
        if isinstance(self.fps, bool) or not isinstance(self.fps, Real) or not 0 < self.fps < math.inf:
            raise ConfigError(f"fps is {self.fps!r}: give a positive number of frames per second, such as 2.0")
        if self.sample_by not in SAMPLE_BY:
            raise ConfigError(f"sample_by is {self.sample_by!r}: choose from {', '.join(SAMPLE_BY)}")
        if self.max_frames < 2:
            raise ConfigError(f"max_frames is {self.max_frames}: frames go in pairs, give at least 2")
        for low, high in (("frame_min_tokens", "frame_max_tokens"), ("image_min_tokens", "image_max_tokens")):
            if getattr(self, low) > getattr(self, high):
                raise ConfigError(
                    f"{low} ({getattr(self, low)}) is above {high} ({getattr(self, high)}): "
                    "lower the one or raise the other"
                )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(v) for v in values):
                raise ConfigError(f"{name} is {values!r}: give three numbers, for red, green and blue")
        if min(self.std) <= 0:
            raise ConfigError(f"std is {self.std!r}: give three positive numbers")

    @property
    def factor(self) -> int:
        """Pixels per side of a token; heights and widths are multiples of it."""
        return self.patch_size * self.merge_size

    def with_overrides(self, **values: Any) -> Self:
        """Return a copy with the given fields replaced; a value of None leaves the field as it is.

        Raises `ConfigError` for an unknown field or a value that cannot be used.
        """
        known = {field.name for field in fields(self)}
        most = values.get("image_max_tokens")
        if isinstance(most, int) and values.get("image_min_tokens") is None:  # the maximum overrides the minimum
            values["image_min_tokens"] = max(1, min(self.image_min_tokens, most))
        if unknown := sorted(values.keys() - known):
            raise ConfigError(f"unknown vision setting {unknown[0]!r}: choose from {', '.join(sorted(known))}")
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_files(
        cls,
        rules: FrameRules,
        config: Mapping[str, Any],
        image_processor: Mapping[str, Any] | None = None,
        video_processor: Mapping[str, Any] | None = None,
    ) -> Self:
        """Read a checkpoint's files, as parsed JSON.

        Args:
            rules: of the checkpoint's family (`mlxvr.model.families`, whose `vision_spec` calls this).
            config: `config.json`.
            image_processor: `preprocessor_config.json`, or None.
            video_processor: `video_preprocessor_config.json`, or None.
                (Either may also be transformers 5's `processor_config.json`, which nests the two.)

        Raises `CheckpointError` if the files contradict each other or hold values that cannot be used.
        """
        image = _section(image_processor, "image_processor")
        video = _section(video_processor, "video_processor")
        vision = config.get("vision_config") or {}
        patch = _agreed("patch_size", (vision, "patch_size"), image, video) or rules.patch_size
        merge = _agreed("merge_size", (vision, "spatial_merge_size"), image, video) or 2
        temporal = _agreed("temporal_patch_size", (vision, "temporal_patch_size"), image, video) or 2
        token = (patch * merge) ** 2  # pixels

        image_tokens = _overlap(_pixel_range(image, token), _IMAGE_TOKENS)
        frame_tokens, video_tokens = _FRAME_TOKENS, _VIDEO_TOKENS
        low, high = _pixel_range(video, token)
        if rules.counts_whole_clip:
            video_tokens = min(video_tokens, high // temporal) if high else video_tokens
            frame_tokens = _overlap((None, _first("max_video_tokens", video)), frame_tokens)
        else:
            frame_tokens = _overlap((low, high), frame_tokens)
        try:
            return cls(
                patch_size=patch,
                merge_size=merge,
                temporal_patch_size=temporal,
                mean=tuple(_first("image_mean", image, video) or rules.mean),
                std=tuple(_first("image_std", image, video) or rules.std),
                fps=float(_first("fps", video) or 2.0),
                min_frames=_first("min_frames", video) or 4,
                max_frames=_first("max_frames", video) or 768,
                frame_min_tokens=frame_tokens[0],
                frame_max_tokens=frame_tokens[1],
                video_tokens=video_tokens,
                image_min_tokens=image_tokens[0],
                image_max_tokens=image_tokens[1],
            )
        except (ConfigError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's processor files cannot be used: {error}") from error


_COUNTS = tuple(field.name for field in fields(VisionSpec) if field.type is int)


def _section(processor: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """Return the settings of one processor, even if the file nests those of both."""
    processor = processor or {}
    return processor.get(name) or processor


def _first(key: str, *sources: Mapping[str, Any]) -> Any:
    return next((source[key] for source in sources if source.get(key) is not None), None)


def _agreed(
    key: str, configured: tuple[Mapping[str, Any], str], image: Mapping[str, Any], video: Mapping[str, Any]
) -> int | None:
    """Return the value of a geometry setting, in which the network's shape and both processors must agree."""
    source, source_key = configured
    stated = {
        "config.json": source.get(source_key),
        "preprocessor_config.json": image.get(key),
        "video_preprocessor_config.json": video.get(key),
    }
    stated = {file: value for file, value in stated.items() if value is not None}
    if len(set(stated.values())) > 1:
        listed = ", ".join(f"{value} in {file}" for file, value in stated.items())
        raise CheckpointError(f"the checkpoint's files disagree on {key} ({listed}): download the folder again")
    return next(iter(stated.values()), None)


def _pixel_range(processor: Mapping[str, Any], token_pixels: int) -> tuple[int | None, int | None]:
    """(least, most) tokens that a processor file allows, None where it says nothing.

    There are three spellings: min_pixels and max_pixels at the top (these win, as in transformers), the same inside
    `size`, and `size.shortest_edge` and `size.longest_edge`, which are pixel counts in spite of their names.
    """
    size = processor.get("size") or {}
    least = _first("min_pixels", processor, size) or size.get("shortest_edge")
    most = _first("max_pixels", processor, size) or size.get("longest_edge")
    return (
        None if least is None else math.ceil(least / token_pixels),
        None if most is None else max(1, int(most // token_pixels)),
    )


def _overlap(allowed: tuple[int | None, int | None], trained: tuple[int, int]) -> tuple[int, int]:
    """The range in which both hold; if there is none, what the file allows."""
    low = trained[0] if allowed[0] is None else allowed[0]
    high = trained[1] if allowed[1] is None else allowed[1]
    if max(low, trained[0]) <= min(high, trained[1]):
        return max(low, trained[0]), min(high, trained[1])
    return min(low, high), high
