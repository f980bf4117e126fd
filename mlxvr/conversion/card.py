"""What goes into a converted folder beside the weights: config, tokenizer files, `mlxvr.json`, the model card.

`mlxvr.json` is for programs (where the weights come from, how they were made, their threshold and frame limits), the
card for people. Neither holds a date or a path, so that the same conversion gives the same bytes.
"""

import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlxvr.checkpoint import hub
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.checkpoint.recipe import Recipe
from mlxvr.errors import CheckpointError
from mlxvr.storage.atomic import write_synced
from mlxvr.storage.paths import list_visible

__all__ = ["Origin", "origin", "settings", "with_threshold", "write"]

_WRITTEN_HERE = ("config.json", "mlxvr.json", "README.md")
_OF_THE_RUN = ("source", "source_run", "seconds", "peak_memory")
_THRESHOLD_ROW = re.compile(r"^\| Threshold \|.*\|$", re.MULTILINE)
_METADATA = [
    "library_name",
    "pipeline_tag",
    "license",
    "license_name",
    "license_link",
    "base_model",
    "base_model_relation",
]
_VERSIONED = ("mlxvr", "mlx", "mlx-vlm")


@dataclass(frozen=True)
class Origin:
    """Where weights come from: a Hub id (or, for a folder of the user's own, its name) and a commit ('': unknown)."""

    name: str
    commit: str
    is_hub: bool


def origin(folder: ModelFolder, source: str | Path) -> Origin:
    """Find out where a source comes from; an earlier conversion says so itself."""
    repo_id, commit = hub.origin_of(folder.path)
    if hub.is_hub_id(source):
        return Origin(hub.repo_id(str(source)), commit, is_hub=True)
    if repo_id:
        return Origin(repo_id, commit, is_hub=True)
    recorded = folder.settings.get("source")
    if isinstance(recorded, str) and recorded:
        return Origin(recorded, str(folder.settings.get("commit") or ""), is_hub="/" in recorded)
    return Origin(folder.path.resolve().name, "", is_hub=False)


def settings(folder: ModelFolder, origin: Origin, recipe: Recipe, *, keep_measured: bool) -> dict[str, Any]:
    """Return the content of `mlxvr.json`.

    `keep_measured`: thresholds, frame limits and a system prompt in the source's own `mlxvr.json` win.
    Raises `CheckpointError` when they make no sense.
    """
    own = folder.settings if keep_measured else {}
    threshold, frame_limits = own.get("threshold", recipe.threshold), own.get("frame_limits", {})
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise _unusable(folder, "threshold", threshold, "a number from 0 to 1")
    if not isinstance(frame_limits, dict):
        raise _unusable(folder, "frame_limits", frame_limits, "an object")
    system_prompt = own.get("system_prompt") or recipe.system_prompt
    resolved = recipe.to_dict()
    quantization = recipe.quantization
    return {
        "source": origin.name,
        "commit": origin.commit,
        "family": folder.family.name,
        "threshold": threshold,
        "frame_limits": frame_limits or resolved["frame_limits"],
        "quantization": {
            "bits": quantization.bits,
            "group_size": quantization.group_size,
            "mode": quantization.mode,
            "dtype": quantization.dtype,
        },
        **({"system_prompt": system_prompt} if system_prompt else {}),
        **({"task_thresholds": own["task_thresholds"]} if own.get("task_thresholds") else {}),
        "recipe": resolved,
        "versions": {name: version(name) for name in _VERSIONED},
    }


def verification(figures: dict[str, Any]) -> dict[str, Any]:
    """Return what `mlxvr.json` keeps of a verification: no paths, and nothing that another run would not find again."""
    return {key: value for key, value in figures.items() if key not in _OF_THE_RUN}


def write(stage: Path, folder: ModelFolder, config: dict[str, Any], settings: dict[str, Any], title: str) -> None:
    """Write everything but the weights into `stage`."""
    for pattern in hub.NEEDED_FILES:
        for file in list_visible(folder.path, pattern):
            if file.name not in _WRITTEN_HERE and "safetensors" not in file.name:
                write_synced(stage / file.name, file.read_bytes())
    write_synced(stage / "config.json", _json(config))
    write_synced(stage / "mlxvr.json", _json(settings))
    write_synced(stage / "README.md", _card(folder, settings, title).encode())


def with_threshold(text: str, threshold: float) -> str:
    """A model card's text with another threshold; unchanged where it is not a card of ours."""
    return _THRESHOLD_ROW.sub(lambda _: f"| Threshold | {_threshold(threshold)} |", text, count=1)


def _threshold(value: float) -> str:
    return f"a direct answer stands from a confidence of {value}"


def _unusable(folder: ModelFolder, key: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{folder.path / 'mlxvr.json'}: {key} = {value!r}; expected {expected}: correct it, or name a recipe"
    )


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _card(folder: ModelFolder, settings: dict[str, Any], title: str) -> str:
    """Compose the model card: metadata that the Hub reads, then how the weights were made and how to use them."""
    from huggingface_hub import ModelCardData

    recipe, quantization = settings["recipe"], settings["quantization"]
    source, commit = settings["source"], settings["commit"]
    licence = _licence(folder.path / "README.md") or {"license": recipe.get("license") or None}
    is_hub = "/" in source
    base = {"base_model": source, "base_model_relation": "quantized"} if is_hub else {}
    tags = ["mlx", "mlxvr", "video", settings["family"]]
    metadata = ModelCardData(library_name="mlx", pipeline_tag="video-text-to-text", tags=tags, **licence, **base)
    link = f"[`{source}`](https://huggingface.co/{source})" if is_hub else f"`{source}`"
    bits, dtype = quantization["bits"], quantization["dtype"]
    how = f"kept in {dtype}"
    if bits == "auto":
        how = f"quantized to bits measured for each module, to fit {quantization['target_bytes'] / 1e9:.2f} GB"
    elif bits:
        mode = "" if quantization["mode"] == "affine" else f" ({quantization['mode']})"
        how = f"quantized to {bits} bits{mode} in groups of {quantization['group_size']}"
    rows = {
        "Source": link + (f", commit `{commit}`" if commit else ""),
        "Weights": f"{how}; vision tower and norms in {dtype}" if bits else how,
        **_adapted(settings.get("adapter")),
        "Bits per weight": f"{quantization['bits_per_weight']:.2f}, everything included",
        "Recipe": f"`{recipe['name']}`",
        "Threshold": _threshold(settings["threshold"]),
        **_verified(settings.get("verification")),
        "Made with": ", ".join(f"{name} {number}" for name, number in settings["versions"].items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
{metadata.to_yaml(original_order=_METADATA)}
---

# {title}

{recipe.get("description") or source}, converted to MLX by mlxvr. The model answers a question about a video
directly, and mlxvr lets it reason only when it is not sure of that answer.

| | |
|---|---|
{table}

## Use

    python -m mlxvr.generate --model {title} --video clip.mp4 --prompt "What happens at the end?"

The folder also loads in stock mlx-vlm (`mlx_vlm.load`).
"""


def _adapted(adapter: dict[str, str] | None) -> dict[str, str]:
    return {"Adapter": f"`{adapter['name']}` ({adapter['fingerprint']}), fused"} if adapter else {}


def _verified(figures: dict[str, Any] | None) -> dict[str, str]:
    """Rows of the card that tell how far the weights are from their source."""
    if figures is None:
        return {}
    limits = figures.get("limits") or {}

    def limit(name: str, form: str) -> str:
        return f" (limit {limits[name]:{form}})" if limits.get(name) is not None else ""

    listed = [
        f"the most likely token agrees on {figures['top1']:.1%} of {figures['tokens']} tokens{limit('top1', '.1%')}"
    ]
    if figures["confidence_drift"] is not None:
        drift = f"{figures['confidence_drift']:.3f}{limit('confidence_drift', 'g')}"
        listed.append(f"confidence moves by {drift} on average")
    if figures["decisions"]:
        flips = f"{figures['flipped']} of {figures['decisions']}"
        listed.append(f"{flips} exit decisions flip{limit('flipped_exits', '.0%')}")
    verdict = {True: "passed", False: "fell short"}.get(figures["passed"], "measured")
    rows = {"Verified": f"{verdict} on {len(figures['probes'])} probe prompts against the source: {'; '.join(listed)}"}
    if figures["shortfalls"]:
        rows["Falls short"] = "; ".join(figures["shortfalls"])
    return rows


def _licence(readme: Path) -> dict[str, Any]:
    """Return the licence in a model card's metadata; {} if the card names none or its metadata is no YAML."""
    from huggingface_hub import ModelCard

    text = readme.read_text(encoding="utf-8-sig", errors="replace") if readme.is_file() else ""
    if not text.startswith("---"):
        return {}
    try:
        metadata = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # of the YAML library, which we do not import
        return {}
    return {name: metadata[name] for name in _METADATA if name.startswith("license") and metadata.get(name)}
