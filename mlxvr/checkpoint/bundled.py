"""The bundled demo: the place of its files, and the test whether a checkpoint or clip belongs to it.

The demo checkpoint only knows a synthetic world of moving shapes and shell games; so does every checkpoint that is
converted, fused or trained from it. It answers questions about the bundled clips; about any other video its answers are
confident and meaningless.
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
    """The folder of the bundled checkpoint (`checkpoint/`) and clips (`clips/`, `clips.jsonl`)."""
    return Path(str(files("mlxvr"))) / "demo"


def is_demo(settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint comes from the bundled one; `settings` is its `mlxvr.json`."""
    recipe = settings.get("recipe")
    return (recipe.get("name") if isinstance(recipe, Mapping) else recipe) == _RECIPE


def is_demo_model(model: str | os.PathLike[str] | None) -> bool:
    """Whether `mlxvr.load(model)` would load the bundled checkpoint or one made from it; reads `mlxvr.json`."""
    if model is None:
        return True
    try:
        settings = json.loads((Path(model) / "mlxvr.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and is_demo(settings)


def is_bundled(path: str | os.PathLike[str]) -> bool:
    """Whether a file is bundled."""
    return Path(path).resolve().is_relative_to(demo_folder().resolve())
