"""The bundled demo: where its files are, and which checkpoints and clips are of its world.

The demo checkpoint knows a synthetic world of moving shapes and shell games, and so does whatever is converted, fused
or trained from it. Such a checkpoint has bundled clips to be asked about, and answers with confidence, but without
sense, about any other video.
"""

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

__all__ = ["NOT_OF_THE_DEMO", "demo_folder", "is_bundled", "is_demo", "is_demo_model"]

NOT_OF_THE_DEMO = (
    "this is the demo model, which knows only its own synthetic world of shapes and cups: what it says about other "
    "videos, and how sure it is, means nothing; name another model for real videos"
)
_RECIPE = "shellgame"


def demo_folder() -> Path:
    """Where the package keeps its bundled checkpoint (`checkpoint/`) and clips (`clips/`, `clips.jsonl`)."""
    return Path(str(files("mlxvr"))) / "demo"


def is_demo(settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint comes from the bundled one, by what its `mlxvr.json` says."""
    recipe = settings.get("recipe")
    return (recipe.get("name") if isinstance(recipe, Mapping) else recipe) == _RECIPE


def is_demo_model(model: str | os.PathLike[str] | None) -> bool:
    """Whether `mlxvr.load(model)` would load the bundled checkpoint, or one that comes from it; reads `mlxvr.json`."""
    if model is None:
        return True
    try:
        settings = json.loads((Path(model) / "mlxvr.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and is_demo(settings)


def is_bundled(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of the bundled ones."""
    return Path(path).resolve().is_relative_to(demo_folder().resolve())
