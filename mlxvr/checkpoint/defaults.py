"""A checkpoint's default values and the source of each; only this module resolves them.

    flag > mlxvr.json > recipe > processor files > built-in

This order applies to the confidence threshold, the frame and token limits, and the system prompt. The same weights
therefore answer alike as a Hub id, as a folder that transformers wrote, and converted.

The `mlxvr.json` of a converted folder contains its recipe. For any other checkpoint, a recipe that was written for it
is searched by several names: the Hub id of its download, the names in its own files (`source` in `mlxvr.json`,
`_name_or_path` in `config.json`), its folder's name, the `base_model` of its model card. People choose the last three
names freely, so a recipe of another family is ignored. If none is found, the family's recipe is used.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from mlxvr.checkpoint import hub
from mlxvr.checkpoint import recipe as recipes
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.checkpoint.recipe import FrameLimits, Recipe
from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.media.spec import VisionSpec
from mlxvr.model.prompt import SYSTEM_PROMPT

__all__ = ["Defaults", "EffectiveSetting", "find_recipe"]

_VALUES = ("threshold", "task_thresholds", "system_prompt")
_LIMITS = tuple(field.name for field in fields(FrameLimits))
_FLAG, _FILE, _PROCESSOR, _BUILT_IN = "flag", "mlxvr.json", "processor files", "built-in"
_STATED = ("fps", "min_frames", "max_frames")  # processor files state these values directly


@dataclass(frozen=True, kw_only=True)
class EffectiveSetting:
    """An effective value and its source.

    Attributes:
        name: such as "threshold" or "max_frames".
        value: JSON-ready.
        source: "flag", "mlxvr.json", "recipe NAME (how it was found)", "processor files", "built-in", or "caller" for
            a value that an app has set.
    """

    name: str
    value: Any
    source: str


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The effective values of a checkpoint.

    Attributes:
        threshold: confidence from which a direct answer is taken, in [0, 1].
        task_thresholds: thresholds that were calibrated for single tasks, by task.
        spec: how frames are sampled and sized.
        system_prompt: the first message of every conversation.
        sources: the source of each value, as in `EffectiveSetting`, by its name ("threshold", "system_prompt",
            "task_thresholds", or a limit).
    """

    threshold: float
    task_thresholds: Mapping[str, float]
    spec: VisionSpec
    system_prompt: str
    sources: Mapping[str, str]

    @classmethod
    def of(cls, folder: ModelFolder) -> Self:
        """Resolve the values of a checkpoint.

        Raises `CheckpointError` when a value in `mlxvr.json` or the processor files cannot be used.
        """
        own = folder.settings
        known = _known(folder)
        threshold, own_limits = own.get("threshold"), _own_limits(folder)
        values: dict[str, Any] = {
            "threshold": known.threshold if threshold is None else _probability("threshold", threshold),
            "system_prompt": _text(own.get("system_prompt")) or known.system_prompt or SYSTEM_PROMPT,
            "task_thresholds": _task_thresholds(own.get("task_thresholds", {})),
        }
        sources = {
            "threshold": known.source if threshold is None else _FILE,
            "system_prompt": _FILE if own.get("system_prompt") else known.source if known.system_prompt else _BUILT_IN,
            "task_thresholds": _FILE if values["task_thresholds"] else _BUILT_IN,
        }
        config = folder.family.mlx_config(folder.config)
        files = folder.family.vision_spec(config, folder.image_processor, folder.video_processor)
        built_in = folder.family.vision_spec(config)
        limits = {**known.limits, **own_limits}
        for name in _LIMITS:
            in_recipe = known.source if name in known.limits else _processor_source(folder, files, built_in, name)
            sources[name] = _FILE if name in own_limits else in_recipe
        try:
            spec = files.with_overrides(**limits)
        except ConfigError as error:
            raise CheckpointError(f"{folder.path / _FILE} or its recipe cannot be used: {error}") from error
        return cls(spec=spec, sources=sources, **values)

    def settings(self, **current: Any) -> tuple[EffectiveSetting, ...]:
        """The values with their sources.

        Args:
            current: `threshold`, `task_thresholds`, `system_prompt` and `spec` as an app has set them; values that
                differ get the source "caller".
        """
        spec = current.get("spec", self.spec)
        effective = []
        for name in (*_VALUES, *_LIMITS):
            default = getattr(self.spec if name in _LIMITS else self, name)
            value = getattr(spec, name) if name in _LIMITS else current.get(name, default)
            source = self.sources[name] if value == default else "caller"
            plain = dict(value) if isinstance(value, Mapping) else value
            effective.append(EffectiveSetting(name=name, value=plain, source=source))
        return tuple(effective)

    def with_flags(self, **flags: Any) -> Self:
        """Copy with a command line's values, by the names of `EffectiveSetting`; None: the old value.

        Raises `ConfigError` for a value that cannot be used.
        """
        asked = {name: value for name, value in flags.items() if value is not None}
        limits = {name: asked.pop(name) for name in _LIMITS if name in asked}
        values: dict[str, Any] = {
            name: getattr(self, name) for name in ("threshold", "task_thresholds", "system_prompt")
        }
        sources = {**self.sources, **dict.fromkeys((*asked, *limits), _FLAG)}
        return type(self)(spec=self.spec.with_overrides(**limits), sources=sources, **{**values, **asked})


def find_recipe(folder: ModelFolder, source: str = "") -> tuple[Recipe, str]:
    """The shipped recipe for a checkpoint, and a phrase that explains how it was found.

    `source` is the Hub id or name under which the caller knows the checkpoint. Raises `CheckpointError` when even its
    family has no recipe.
    """
    named: Any = folder.settings.get("recipe")
    name = named.get("name") if isinstance(named, dict) else named
    if isinstance(name, str) and name in recipes.available():
        return recipes.load(name), "named in mlxvr.json"
    for how, candidate in _names(folder, source):
        known = recipes.for_source(candidate)
        if known is not None and known.family == folder.family.name:
            return known, how
    return recipes.for_config(folder.config), "the family's"


@dataclass(frozen=True)
class _Known:
    """The values of a recipe that concern answers."""

    source: str
    threshold: float
    system_prompt: str
    limits: Mapping[str, Any]


def _known(folder: ModelFolder) -> _Known:
    """The recipe that a conversion recorded in `mlxvr.json`, else the one that `find_recipe` finds."""
    recorded = folder.settings.get("recipe")
    if isinstance(recorded, dict) and isinstance(recorded.get("frame_limits", {}), dict):
        threshold = recorded.get("threshold")
        if threshold is None:
            threshold = recipes.for_config(folder.config).threshold
        limits = {name: value for name, value in recorded.get("frame_limits", {}).items() if name in _LIMITS}
        prompt = _text(recorded.get("system_prompt"))
        source = f"recipe {recorded.get('name', '?')} (recorded in mlxvr.json)"
        return _Known(source, _probability("recipe.threshold", threshold), prompt, limits)
    recipe, how = find_recipe(folder)
    limits = {name: value for name, value in vars(recipe.frame_limits).items() if value is not None}
    return _Known(f"recipe {recipe.name} ({how})", recipe.threshold, recipe.system_prompt, limits)


def _names(folder: ModelFolder, source: str) -> Iterator[tuple[str, str]]:
    """Yield (how it was found, Hub id) for every name that the checkpoint may have, the most certain first."""
    repo, _ = hub.origin_of(folder.path)
    yield "by its Hub id", source or repo
    yield "by its Hub id", repo
    yield "by the source in mlxvr.json", str(folder.settings.get("source") or "")
    yield "by _name_or_path in config.json", str(folder.config.get("_name_or_path") or "")
    own = folder.path.resolve().name.casefold()
    for known in map(recipes.load, recipes.available()):
        owner, _, name = known.source.casefold().partition("/")
        if name and own in (name, f"{owner}_{name}", f"{owner}--{name}", f"models--{owner}--{name}"):
            yield "by its folder's name", known.source
    for base in _base_models(folder.path / "README.md"):
        yield "by base_model in its model card", base


def _base_models(card: Path) -> list[str]:
    """The Hub ids under `base_model` in a model card's metadata."""
    try:
        text = card.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    front = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    field = re.search(r"^base_model:(.*(?:\n[ \t]*- .*)*)", front[1], flags=re.MULTILINE) if front else None
    return re.findall(r"[\w.\-]+/[\w.\-]+", field[1]) if field else []


def _own_limits(folder: ModelFolder) -> dict[str, Any]:
    own = folder.settings.get("frame_limits", {})
    if not isinstance(own, dict):
        raise CheckpointError(f"mlxvr.json says frame_limits {own!r}; expected a table of limits: correct the file")
    if unknown := sorted(own.keys() - set(_LIMITS)):
        raise CheckpointError(
            f"mlxvr.json says frame_limits.{unknown[0]}; expected some of {', '.join(_LIMITS)}: correct the file"
        )
    return {name: value for name, value in own.items() if value is not None}


def _processor_source(folder: ModelFolder, files: VisionSpec, built_in: VisionSpec, name: str) -> str:
    """ "processor files" if they decide a limit, else "built-in"; token limits are training's own, see `VisionSpec`."""
    video = folder.video_processor or {}
    stated = (video.get("video_processor") or video).get(name) if name in _STATED else None
    return _BUILT_IN if stated is None and getattr(files, name) == getattr(built_in, name) else _PROCESSOR


def _task_thresholds(own: object) -> dict[str, float]:
    if not isinstance(own, dict):
        raise CheckpointError(f"mlxvr.json says task_thresholds {own!r}; expected a table of numbers: correct the file")
    return {task: _probability(f"task_thresholds.{task}", value) for task, value in own.items()}


def _probability(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise CheckpointError(f"mlxvr.json says {name} {value!r}; expected a number from 0 to 1: correct the file")
    return float(value)


def _text(value: object) -> str:
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"mlxvr.json says system_prompt {value!r}; expected a text: correct the file")
    return value or ""
