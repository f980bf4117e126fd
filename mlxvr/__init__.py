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
    from mlxvr.reasoner.reasoner import Answer, Clip, FirstAnswer, Option, Reasoner, ReasoningDelta, Usage, load

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Cancelled",
    "CheckpointError",
    "Clip",
    "ConfigError",
    "DataError",
    "FirstAnswer",
    "MediaError",
    "MlxvrError",
    "Option",
    "OutOfMemoryError",
    "Reasoner",
    "ReasoningDelta",
    "RecipeError",
    "Usage",
    "VerificationError",
    "load",
]

_FROM_REASONER = frozenset({"Answer", "Clip", "FirstAnswer", "Option", "Reasoner", "ReasoningDelta", "Usage", "load"})


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'mlxvr' has no attribute {name!r}")
    value = getattr(import_module("mlxvr.reasoner.reasoner" if name in _FROM_REASONER else "mlxvr.errors"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
