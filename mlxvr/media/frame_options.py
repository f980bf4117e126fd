"""Which frames of a clip are read and how large: the options of `Reasoner.open`, of verbs, and of lmms-eval."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypedDict

from mlxvr.cli.parser import clock_time
from mlxvr.cli.settings import flag
from mlxvr.errors import ConfigError
from mlxvr.media.spec import SAMPLE_BY, VisionSpec

__all__ = ["ALL_FRAMES", "FrameKeywords", "FrameLimitOptions", "FrameOptions", "FrameSelection"]


@dataclass(frozen=True, kw_only=True)
class FrameLimitOptions:
    """How many frames and tokens a clip may have; None: the checkpoint's. `Reasoner.open` describes the fields."""

    fps: float | None = field(default=None, metadata=flag("frames", "frames to sample per second", metavar="F"))
    max_frames: int | None = field(default=None, metadata=flag("frames", "the most frames to sample", metavar="N"))
    video_tokens: int | None = field(
        default=None, metadata=flag("frames", "the most tokens of a clip; a frame keeps its minimum", metavar="N")
    )
    image_tokens: int | None = field(
        default=None, metadata=flag("frames", "the most tokens that an image may take", metavar="N")
    )

    @property
    def overrides(self) -> dict[str, Any]:
        """What differs from the checkpoint's `VisionSpec`, by the names of its fields."""
        values = {
            "fps": self.fps,
            "max_frames": self.max_frames,
            "video_tokens": self.video_tokens,
            "image_max_tokens": self.image_tokens,
        }
        return {name: value for name, value in values.items() if value is not None}

    def applied_to(self, spec: VisionSpec) -> VisionSpec:
        """A checkpoint's limits, with these in their place; raises `ConfigError` for a value that cannot be used."""
        return spec.with_overrides(**self.overrides)


@dataclass(frozen=True, kw_only=True)
class FrameSelection:
    """Which part of a clip is read, and when its frames were taken. `Reasoner.open` describes the fields."""

    frames: int | None = field(
        default=None, metadata=flag("frames", "sample exactly this many frames instead of by --fps", metavar="N")
    )
    start: float | None = field(
        default=None,
        metadata=flag("frames", "begin here: seconds, or a time such as 1:05", metavar="T", type=clock_time),
    )
    end: float | None = field(
        default=None,
        metadata=flag("frames", "end here: seconds, or a time such as 1:05", metavar="T", type=clock_time),
    )
    timestamps: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.frames is not None and (isinstance(self.frames, bool) or not isinstance(self.frames, Integral)):
            raise ConfigError(f"frames is {self.frames!r}: give a whole number of frames")
        for name, seconds in (("start", self.start), ("end", self.end)):
            if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, Real)):
                raise ConfigError(f"{name} is {seconds!r}: give seconds, such as 65.5")


ALL_FRAMES = FrameSelection()  # the whole clip, at the rate of `VisionSpec.fps`


@dataclass(frozen=True, kw_only=True)
class FrameOptions(FrameSelection, FrameLimitOptions):
    """Which frames of a clip are read and how large; refuses values that cannot be used when it is built."""

    fps: float | None = field(
        default=None,
        metadata=flag("frames", "frames to sample per second; of a folder: the rate of its frames", metavar="F"),
    )
    sample_by: str | None = field(
        default=None,
        metadata=flag(
            "frames",
            "where the rate varies: frames at even distances in time (default), or every so many frames",
            choices=SAMPLE_BY,
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fps is not None and self.timestamps is not None:
            raise ConfigError("fps and timestamps both say when frames were taken: give one of them")

    @property
    def overrides(self) -> dict[str, Any]:
        """What differs from the checkpoint's `VisionSpec`, by the names of its fields."""
        return super().overrides | ({} if self.sample_by is None else {"sample_by": self.sample_by})


class FrameKeywords(TypedDict, total=False):
    """The keywords of `Reasoner.open`: the fields of `FrameOptions`."""

    fps: float | None
    max_frames: int | None
    frames: int | None
    video_tokens: int | None
    image_tokens: int | None
    timestamps: Sequence[float] | None
    sample_by: str | None
    start: float | None
    end: float | None
