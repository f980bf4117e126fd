"""One reading of `config.json`, whichever release of transformers or MLX wrote it.

transformers 4.57 writes `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`. Qwen2.5-VL's text
settings stand at the root (its first release), under `text_config` (transformers 5) or in both places (4.57), and a
converted folder carries mlx-vlm's spelling. A `null` in a section says nothing: transformers 4.52 to 4.55 write the
token ids of the root as null into `text_config`. `tests/releases/configs` holds what the releases write.

`normalise` turns each of them into the one spelling that stock mlx-vlm 0.7.10 reads and that the rest of mlxvr relies
on: every key present, `text_config` complete, `rope_scaling` with `type` and `mrope_section`. It is idempotent and
leaves keys that it does not know as they are, nulls of sections aside.

Values that a file leaves out are those of transformers' configuration classes, which is what its writer meant. Settings
that the network code does not implement are refused here, since they would otherwise give wrong numbers silently. Both
are particular to a family, which states them as `ConfigRules`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxvr.errors import CheckpointError

__all__ = ["ConfigRules", "is_tied", "normalise", "text_settings", "untie"]

_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
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
_PLAIN_ROPE = (None, "default", "mrope")


@dataclass(frozen=True, kw_only=True)
class ConfigRules:
    """What a family's `config.json` leaves out, and what its network implements.

    Attributes:
        model_type: the family's name in the file.
        text_model_type: mlx-vlm's name of the language model.
        text_at_root: mlx-vlm reads the text settings from the root.
        head_dim: of the language model where the file leaves it out; None: always hidden_size / num_attention_heads.
        must_be_off: text settings that the network does not implement.
        vision_defaults: the keys of `vision_config`, with the values of those that the file leaves out. Its
            `hidden_act` is the only one that the network implements.
        rope_theta, mrope_section: of the rotary embedding, likewise.
        token_ids: of the media, likewise.
    """

    model_type: str
    text_model_type: str
    text_at_root: bool = False
    head_dim: int | None = None
    must_be_off: tuple[str, ...] = ()
    vision_defaults: Mapping[str, Any]
    rope_theta: float
    mrope_section: tuple[int, ...]
    token_ids: Mapping[str, int]


def normalise(config: Mapping[str, Any], rules: ConfigRules) -> dict[str, Any]:
    """Rewrite a parsed `config.json` in the spelling that mlx-vlm reads; the input is not changed.

    Raises `CheckpointError` for a setting that is missing or that the network code does not implement.
    """
    text = _text_section(config, rules)
    vision = {**rules.vision_defaults, **_section(config, "vision_config")}
    if "in_chans" in vision:  # the spelling of Qwen2.5-VL's first release
        vision["in_channels"] = vision.pop("in_chans")
    _refuse_unimplemented(text, vision, rules)
    vision["model_type"] = rules.model_type
    result = {**config, **_token_ids(config, rules)}
    result.pop("rope_parameters", None)
    if rules.text_at_root:
        result.update(text)
    result.update(
        model_type=rules.model_type,
        tie_word_embeddings=text["tie_word_embeddings"],
        text_config=text,
        vision_config=vision,
    )
    return result


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's settings wherever the file keeps them: the root's, then `text_config`'s on top.

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


def _token_ids(config: Mapping[str, Any], rules: ConfigRules) -> dict[str, int]:
    """The ids of the media's tokens: the root's, else those in `text_config`, else the family's."""
    stated = {key: value for key, value in config.items() if value is not None}
    nested = _section(config, "text_config")
    return {key: stated.get(key, nested.get(key, rules.token_ids[key])) for key in _TOKEN_IDS}


def _text_section(config: Mapping[str, Any], rules: ConfigRules) -> dict[str, Any]:
    """The complete text settings under one roof, with rope in the older spelling."""
    text = text_settings(config)
    if missing := [key for key in _NEEDED_TEXT if text.get(key) is None]:
        raise CheckpointError(
            f"config.json does not say {missing[0]!r} of the language model: download the checkpoint again"
        )
    if text.get("num_key_value_heads") is None:
        text["num_key_value_heads"] = text["num_attention_heads"]
    if rules.head_dim is not None and text.get("head_dim") is None:
        text["head_dim"] = rules.head_dim
    text.setdefault("hidden_act", "silu")
    text["tie_word_embeddings"] = is_tied(config)
    text["model_type"] = rules.text_model_type
    theta, section = _rope(text, rules)
    text.pop("rope_parameters", None)
    text["rope_theta"] = theta
    text["rope_scaling"] = {"type": "default", "mrope_section": section}
    return text


def _rope(text: Mapping[str, Any], rules: ConfigRules) -> tuple[float, list[int]]:
    """Base and sections of the rotary embedding from either spelling."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind not in _PLAIN_ROPE:
        raise CheckpointError(
            f"config.json asks for the rope type {kind!r}; only the default one is implemented: remove the scaling "
            "to use the model at its original context length"
        )
    theta = rope.get("rope_theta") or text.get("rope_theta")
    section = list(rope.get("mrope_section") or rules.mrope_section)
    head_dim = text.get("head_dim") if rules.head_dim is not None else None
    half = int(head_dim or text["hidden_size"] // text["num_attention_heads"]) // 2
    if sum(section) != half:
        raise CheckpointError(
            f"config.json splits the rotary embedding as {section}, which makes {sum(section)}; expected {half}, half "
            "of a head: the checkpoint is damaged"
        )
    return float(theta or rules.rope_theta), section


def _refuse_unimplemented(text: Mapping[str, Any], vision: Mapping[str, Any], rules: ConfigRules) -> None:
    settings = {  # name: (in the file, implemented)
        "text hidden_act": (text["hidden_act"], "silu"),
        "vision hidden_act": (vision["hidden_act"], rules.vision_defaults["hidden_act"]),
        "vision in_channels": (vision["in_channels"], 3),
        "use_sliding_window": (bool(text.get("use_sliding_window")), False),
        "layer_types": (sorted(set(text.get("layer_types") or ["full_attention"])), ["full_attention"]),
        **{key: (bool(text.get(key)), False) for key in rules.must_be_off},
    }
    for key, (in_file, implemented) in settings.items():
        if in_file != implemented:
            raise CheckpointError(
                f"config.json sets {key} to {in_file!r}; {rules.model_type} is implemented for {implemented!r} only"
            )
