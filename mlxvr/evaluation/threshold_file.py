"""A calibrated threshold on disk: in a model folder's `mlxvr.json`, where the reasoner finds it, or in another file.

An old threshold and its evidence stay beside the new one. Files are replaced in one step.
"""

import json
import os
from pathlib import Path
from typing import Any

from mlxvr.conversion.card import with_threshold
from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.evaluation.analysis.calibration import Calibration
from mlxvr.storage.atomic import replace_file

__all__ = ["check_writable", "save_threshold", "write_threshold"]

_EVIDENCE = ("goal", "margin", "budget", "folds", "seed", "held_out")


def write_threshold(model_folder: str | os.PathLike[str], calibration: Calibration) -> Path:
    """Write a threshold into a model folder's `mlxvr.json`, where the reasoner finds it; return that file.

    The old threshold moves to `previous_thresholds`, the evidence goes to `calibration`, thresholds of tasks go to
    `task_thresholds` (`Reasoner.task_thresholds`). The file is replaced in one step; then the model card, which also
    names the threshold, is replaced.

    Raises:
        ConfigError: the threshold is above 1, or the file cannot be written.
        CheckpointError: there is no such folder, or its `mlxvr.json` is damaged.
    """
    folder = Path(model_folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; give the folder of a model")
    path = save_threshold(folder / "mlxvr.json", calibration)
    card = folder / "README.md"
    if card.is_file():
        before = card.read_text(encoding="utf-8")
        after = with_threshold(before, calibration.threshold)
        if after != before:
            _replace(card, after)
    return path


def save_threshold(path: str | os.PathLike[str], calibration: Calibration) -> Path:
    """Write a threshold into any file, in the fields that `mlxvr.json` has; return the file.

    Other fields of the file stay; an old threshold moves to `previous_thresholds`. Errors are those of
    `write_threshold`.
    """
    path = Path(path)
    if calibration.threshold > 1:
        raise ConfigError("only always thinking meets this goal, and no threshold up to 1 says so: ask with mode think")
    settings = _settings(path)
    evidence = calibration.to_dict()
    new = {"threshold": calibration.threshold, "calibration": {key: evidence[key] for key in _EVIDENCE}}
    if calibration.per_task:
        new["task_thresholds"] = {name: task.threshold for name, task in calibration.per_task.items()}
    old = {key: settings.pop(key) for key in ("threshold", "calibration", "task_thresholds") if key in settings}
    if old and old != json.loads(json.dumps(new)):
        settings["previous_thresholds"] = [*settings.get("previous_thresholds", []), old]
    _replace(path, json.dumps(settings | new, indent=2, ensure_ascii=False) + "\n")
    return path


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise what `save_threshold` would raise for a file, before there is a threshold."""
    path = Path(path)
    _settings(path)
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{path} cannot be written; make its folder writable")


def _replace(path: Path, text: str) -> None:
    replace_file(path, lambda file: file.write(text.encode()), advice="make its folder writable")


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); correct or remove it") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("previous_thresholds", []), list):
        raise CheckpointError(f"{path} does not have the form that a conversion writes; correct or remove it")
    return settings
