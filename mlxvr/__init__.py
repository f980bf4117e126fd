"""VideoAuto-R1 on MLX: answer a video question, know how sure the answer is, reason only when needed.

    import mlxvr

    reasoner = mlxvr.load()                     # the bundled demo checkpoint; or a folder; or a Hub id
    clip = reasoner.open("clip.mp4")
    answer = clip.ask("What happens at the end?")
    print(answer.text, answer.confidence, answer.reasoned)

Names are imported on first use, so that `import mlxvr` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxvr.answering.events import Answer, Event, FirstAnswer, Option, ReasoningDelta, Usage
    from mlxvr.answering.loop import AskKeywords, AskRequest, Kind, Mode
    from mlxvr.errors import (
        Cancelled,
        CheckpointError,
        ConfigError,
        DataError,
        MediaError,
        MlxvrError,
        OutOfMemoryError,
        RecipeError,
        VerificationError,
    )
    from mlxvr.media.frame_options import FrameKeywords
    from mlxvr.reasoner.clip import Clip
    from mlxvr.reasoner.load_options import LoadKeywords
    from mlxvr.reasoner.reasoner import OpenAndAskKeywords, Reasoner, load

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AskKeywords",
    "AskRequest",
    "Cancelled",
    "CheckpointError",
    "Clip",
    "ConfigError",
    "DataError",
    "Event",
    "FirstAnswer",
    "FrameKeywords",
    "Kind",
    "LoadKeywords",
    "MediaError",
    "MlxvrError",
    "Mode",
    "OpenAndAskKeywords",
    "Option",
    "OutOfMemoryError",
    "Reasoner",
    "ReasoningDelta",
    "RecipeError",
    "Usage",
    "VerificationError",
    "load",
]

_MODULES = {
    "answering.events": {"Answer", "Event", "FirstAnswer", "Option", "ReasoningDelta", "Usage"},
    "answering.loop": {"AskKeywords", "AskRequest", "Kind", "Mode"},
    "media.frame_options": {"FrameKeywords"},
    "reasoner.clip": {"Clip"},
    "reasoner.load_options": {"LoadKeywords"},
    "reasoner.reasoner": {"OpenAndAskKeywords", "Reasoner", "load"},
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'mlxvr' has no attribute {name!r}")
    module = next((module for module, names in _MODULES.items() if name in names), "errors")
    value = getattr(import_module(f"mlxvr.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
