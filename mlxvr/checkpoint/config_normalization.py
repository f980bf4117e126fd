"""One reading of `config.json` in all the dialects that it is written in.

transformers 4.57 writes `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`. Qwen2.5-VL's text
settings stand at the root (its first release), under `text_config` (transformers 5) or in both places (4.57), and a
converted folder carries mlx-vlm's spelling. A `null` in a section says nothing: transformers 4.52 to 4.55 write the
token ids of the root as null into `text_config`. `tests/releases/configs` holds what the releases write.

`normalise` turns each of them into the one spelling that stock mlx-vlm 0.7.10 reads and that the rest of mlxvr relies
on: every key present, `text_config` complete, `rope_scaling` with `type` and `mrope_section`. It is idempotent and
leaves keys that it does not know as they are, nulls of sections aside.

Values that a file leaves out are those of transformers' configuration classes, which is what its writer meant. Settings
that the network code does not implement are refused here, since they would otherwise give wrong numbers silently.
"""

from collections.abc import Mapping
from typing import Any

from mlxvr.errors import CheckpointError

__all__ = ["is_tied", "normalise", "text_settings", "untie"]

_TOKEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_NEEDED_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)
_NOT_TEXT = frozenset(
    {
        "architectures",
        "dtype",
        "quantization",
        "quantization_config",
        "text_config",
        "torch_dtype",
        "transformers_version",
        "vision_config",
    }
)
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 3584,
        "in_channels": 3,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 4,
        "window_size": 112,
    },
    "qwen3_vl": {
        "deepstack_visual_indexes": [8, 16, 24],
        "depth": 27,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "in_channels": 3,
        "intermediate_size": 4304,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 3584,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
_ROPE_DEFAULTS = {"qwen2_5_vl": (1_000_000.0, [16, 24, 24]), "qwen3_vl": (5_000_000.0, [24, 20, 20])}
_PLAIN_ROPE = (None, "default", "mrope")


def normalise(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Rewrite a parsed `config.json` in the spelling that mlx-vlm reads; the input is not changed.

    Raises `CheckpointError` for a setting that is missing or that the network code does not implement.
    """
    text = _text_section(config, family)
    vision = {**_VISION_DEFAULTS[family], **_section(config, "vision_config")}
    if "in_chans" in vision:  # the spelling of Qwen2.5-VL's first release
        vision["in_channels"] = vision.pop("in_chans")
    _refuse_unimplemented(text, vision, family)
    vision["model_type"] = family
    result = {**config, **_token_ids(config)}
    result.pop("rope_parameters", None)
    if family == "qwen2_5_vl":  # mlx-vlm reads this family's text settings from the root
        result.update(text)
    result.update(
        model_type=family,
        tie_word_embeddings=text["tie_word_embeddings"],
        text_config=text,
        vision_config=vision,
    )
    return result


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's settings wherever the dialect keeps them: the root's, then `text_config`'s on top.

    Token ids of media belong to the root alone, and a null in `text_config` does not hide the root's value.
    """
    merged = {**config, **_section(config, "text_config")}
    return {key: value for key, value in merged.items() if key not in _NOT_TEXT and key not in _TOKEN_IDS}


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the embedding serves as the output head: the root says so, or `text_config` does."""
    nested = (config.get("text_config") or {}).get("tie_word_embeddings")
    return bool(config.get("tie_word_embeddings", nested)) or bool(nested)


def untie(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same network with an output head of its own."""
    text = config.get("text_config")
    nested = {"text_config": {**text, "tie_word_embeddings": False}} if text else {}
    return {**config, "tie_word_embeddings": False, **nested}


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of the config without its nulls; {} if there is none."""
    return {key: value for key, value in (config.get(name) or {}).items() if value is not None}


def _token_ids(config: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the media's tokens: the root's, else those in `text_config`, else Qwen's."""
    stated = {key: value for key, value in config.items() if value is not None}
    nested = _section(config, "text_config")
    return {key: stated.get(key, nested.get(key, default)) for key, default in _TOKEN_IDS.items()}


def _text_section(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The complete text settings under one roof, with rope in the older spelling."""
    text = text_settings(config)
    if missing := [key for key in _NEEDED_TEXT if text.get(key) is None]:
        raise CheckpointError(
            f"config.json does not say {missing[0]!r} of the language model: download the checkpoint again"
        )
    if text.get("num_key_value_heads") is None:
        text["num_key_value_heads"] = text["num_attention_heads"]
    if family == "qwen3_vl" and text.get("head_dim") is None:
        text["head_dim"] = 128
    text.setdefault("hidden_act", "silu")
    text["tie_word_embeddings"] = is_tied(config)
    text["model_type"] = "qwen3_vl_text" if family == "qwen3_vl" else family
    theta, section = _rope(text, family)
    text.pop("rope_parameters", None)
    text["rope_theta"] = theta
    text["rope_scaling"] = {"type": "default", "mrope_section": section}
    return text


def _rope(text: Mapping[str, Any], family: str) -> tuple[float, list[int]]:
    """Base and sections of the rotary embedding from either spelling."""
    default_theta, default_section = _ROPE_DEFAULTS[family]
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind not in _PLAIN_ROPE:
        raise CheckpointError(
            f"config.json asks for the rope type {kind!r}; only the default one is implemented: remove the scaling "
            "to use the model at its original context length"
        )
    theta = rope.get("rope_theta") or text.get("rope_theta")
    section = list(rope.get("mrope_section") or default_section)
    head = text.get("head_dim") if family == "qwen3_vl" else None
    half = int(head or text["hidden_size"] // text["num_attention_heads"]) // 2
    if sum(section) != half:
        raise CheckpointError(
            f"config.json splits the rotary embedding as {section}, which makes {sum(section)}; expected {half}, half "
            "of a head: the checkpoint is damaged"
        )
    return float(theta or default_theta), section


def _refuse_unimplemented(text: Mapping[str, Any], vision: Mapping[str, Any], family: str) -> None:
    expected = {
        "text hidden_act": (text["hidden_act"], "silu"),
        "vision hidden_act": (vision["hidden_act"], _VISION_DEFAULTS[family]["hidden_act"]),
        "vision in_channels": (vision["in_channels"], 3),
        "use_sliding_window": (bool(text.get("use_sliding_window")), False),
        "layer_types": (sorted(set(text.get("layer_types") or ["full_attention"])), ["full_attention"]),
    }
    if family == "qwen3_vl":
        expected["attention_bias"] = (bool(text.get("attention_bias")), False)
    for key, (found, wanted) in expected.items():
        if found != wanted:
            raise CheckpointError(f"config.json sets {key} to {found!r}; {family} is implemented for {wanted!r} only")
