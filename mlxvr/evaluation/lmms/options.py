"""The model arguments that a user of lmms-eval gives, `--model_args pretrained=..,mode=auto,..`, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from mlxvr.answering.loop import AskOptions, AskRequest, Mode
from mlxvr.errors import ConfigError

__all__ = ["LmmsOptions"]

_UNSET = frozenset({"", "none", "null"})


@dataclass(frozen=True, kw_only=True)
class LmmsOptions:
    r"""How lmms-eval's questions are answered; refuses values that cannot be used when it is built.

    Attributes:
        pretrained: a converted folder, a folder as transformers writes it, or a Hub id; None: the bundled checkpoint.
        adapter: folder of LoRA weights to put on top.
        revision: branch, tag or commit of a Hub id.
        mode: "auto" reasons only when the first answer is not sure enough; "direct" never; "think" always.
        threshold: confidence that is sure enough, in [0, 1]; None: the checkpoint's own.
        fps: frames to sample per second; None: the checkpoint's.
        max_frames: the most frames to sample; None: the checkpoint's.
        video_tokens: the most tokens that a video may take; None: the checkpoint's.
        image_tokens: the most tokens that an image may take; None: the checkpoint's, at most 4,096 (the public
            evaluation allows 16,384).
        frames_fps: how far apart the pictures are of which a task hands over several for one question, per second;
            None: as far as frames that we sample ourselves.
        dtype: what to compute in; None: the checkpoint's.
        kv_bits: keep keys and values in 2, 3, 4, 6 or 8 bits; None: as computed.
        max_new_tokens: the most tokens that are generated.
        response_prefix: how the answer is begun for the model, ``\boxed{Answer:`` in the public evaluation of MVP.
        log_file: JSONL that gets a line per question: first answer, confidence, reasoning, tokens, seconds.
    """

    pretrained: str | None = None
    adapter: str | None = None
    revision: str | None = None
    mode: Mode = "auto"
    threshold: float | None = None
    fps: float | None = None
    max_frames: int | None = None
    video_tokens: int | None = None
    image_tokens: int | None = None
    frames_fps: float | None = None
    dtype: str | None = None
    kv_bits: int | None = None
    max_new_tokens: int = 4096
    response_prefix: str = ""
    log_file: str | None = None

    def __post_init__(self) -> None:
        AskRequest("?", **self.asking())

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "LmmsOptions":
        """Read lmms-eval's arguments: texts and numbers as it made them of the command line.

        Raises `ConfigError` for a name that is not known and a value that cannot be used.
        """
        known = {field.name: field.default for field in fields(cls)}
        if unknown := sorted(arguments.keys() - known.keys()):
            raise ConfigError(f"model argument {unknown[0]!r} is unknown: choose from {', '.join(known)}")
        kinds = get_type_hints(cls)
        return cls(**{name: _value(name, value, known[name], kinds[name]) for name, value in arguments.items()})

    def asking(self) -> AskOptions:
        """The options of `Clip.ask` that every question shares."""
        return {
            "mode": self.mode,
            "threshold": self.threshold,
            "max_tokens": self.max_new_tokens,
            "response_prefix": self.response_prefix,
        }


def _value(name: str, value: Any, default: Any, kind: Any) -> Any:
    """A value in the type of its field; "None" and nothing stand for the default."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _UNSET):
        return default
    if kind in (int, int | None):
        if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
            raise ConfigError(f"model argument {name}={value}: expected a whole number")
        return int(value)
    if kind == float | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"model argument {name}={value}: expected a number")
        return float(value)
    return str(value)
