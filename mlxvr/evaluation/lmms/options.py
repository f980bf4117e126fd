"""The model arguments that a user of lmms-eval gives, `--model_args pretrained=..,mode=auto,..`, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxvr.answering.loop import AskKeywords, AskRequest, Mode
from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.cli.settings import read_arguments
from mlxvr.media.frame_options import FrameLimitOptions
from mlxvr.reasoner.load_options import LoadOptions

__all__ = ["LmmsOptions"]

_NAMES = {"pretrained": "model", "max_new_tokens": "max_tokens"}  # lmms-eval's words for ours


@dataclass(frozen=True, kw_only=True)
class LmmsOptions(FrameLimitOptions, LoadOptions):
    r"""How lmms-eval's questions are answered; refuses values that cannot be used when it is built.

    Attributes:
        mode: "auto" reasons only when the first answer is not sure enough; "direct" never; "think" always.
        threshold: confidence that is sure enough, in [0, 1]; None: the checkpoint's own.
        frames_fps: rate, in frames per second, of the pictures where a task gives several for one question; None: the
            rate of frames that we sample ourselves.
        max_tokens: the most tokens that are generated; lmms-eval's `max_new_tokens`.
        response_prefix: text that the model's turn starts with, ``\boxed{Answer:`` in the public evaluation of MVP.
        log_file: JSONL with a line per question: first answer, confidence, reasoning, tokens, seconds.

    The fields of `LoadOptions` and `FrameLimitOptions` come first; `model` is lmms-eval's `pretrained`. An image takes
    at most 4,096 tokens without `image_tokens` (the public evaluation allows 16,384).
    """

    mode: Mode = "auto"
    threshold: float | None = None
    frames_fps: float | None = None
    max_tokens: int = SamplingConfig.max_tokens
    response_prefix: str = ""
    log_file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        AskRequest("?", **self.asking())

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "LmmsOptions":
        """Read lmms-eval's arguments: texts and numbers as it made them of the command line.

        Raises `ConfigError` for a name that is not known and a value that cannot be used.
        """
        return cls(**read_arguments(arguments, cls, subject="model argument", names=_NAMES))

    @property
    def several(self) -> FrameLimitOptions:
        """The limits for several pictures of one question, which were taken at `frames_fps`."""
        return FrameLimitOptions(
            fps=self.frames_fps or self.fps,
            max_frames=self.max_frames,
            video_tokens=self.video_tokens,
            image_tokens=self.image_tokens,
        )

    def asking(self) -> AskKeywords:
        """The options of `Clip.ask` that every question shares."""
        return {
            "mode": self.mode,
            "threshold": self.threshold,
            "max_tokens": self.max_tokens,
            "response_prefix": self.response_prefix,
        }
