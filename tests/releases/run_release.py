"""What one release of transformers writes and computes; `make.py` runs this file under each release.

    python run_release.py configs SOURCES OUT.json      config.json and tensor names of tiny checkpoints that it saves
    python run_release.py positions OUT.json            rope positions of Qwen2.5-VL

SOURCES is a folder that the releases share: the release that a family was published with leaves tiny checkpoints there,
and each later release loads and saves them again, as a fine-tune does.
"""

import inspect
import json
import sys
import types
from pathlib import Path

import torch
import transformers
from prompts import PROMPTS

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 512,
}
VISION = {
    "depth": 4,
    "fullatt_block_indexes": [1, 3],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
    "tokens_per_second": 2,
    "window_size": 112,
}
TEXT3 = TEXT | {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION3 = {
    "deepstack_visual_indexes": [0, 2],
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "num_position_embeddings": 36,
    "out_hidden_size": 64,
    "patch_size": 16,
}
TOKENS = {
    "image_token_id": 446,
    "video_token_id": 447,
    "vision_end_token_id": 444,
    "vision_start_token_id": 443,
}
# The public Qwen2.5-VL-7B-Instruct's config.json, key by key, at these sizes.
PUBLISHED = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 440,
    "eos_token_id": 442,
    **TOKENS,
    "vision_token_id": 445,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 3,
    "model_type": "qwen2_5_vl",
    **TEXT,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        **VISION,
        "hidden_act": "silu",
        "in_chans": 3,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
}
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def write_configs(sources: Path, out: Path) -> None:
    found: dict[str, dict] = {}
    names: dict[str, list[str]] = {}

    def save(model, family: str, name: str) -> Path:
        folder = sources / transformers.__version__ / family / name
        model.to(torch.bfloat16).save_pretrained(folder)
        found[f"{family}/{name}"] = without_paths(json.loads((folder / "config.json").read_text()))
        from safetensors import safe_open

        with safe_open(str(folder / "model.safetensors"), "pt") as file:
            names[f"{family}/{name}"] = sorted(file.keys())
        return folder

    for tied in (False, True):
        end = "-tied" if tied else ""
        published = sources / f"published-qwen2_5_vl{end}"
        if not published.exists():  # weights as the first release names them, beside the public config.json
            folder = save(make_qwen2_5(tied), "qwen2_5_vl", f"made{end}")
            folder.rename(published)
            (published / "config.json").write_text(json.dumps(PUBLISHED | {"tie_word_embeddings": tied}))
        else:
            save(make_qwen2_5(tied), "qwen2_5_vl", f"made{end}")
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(published, torch_dtype="auto")
        save(model, "qwen2_5_vl", f"saved-again{end}")
        if hasattr(transformers, "Qwen3VLConfig"):
            folder = save(make_qwen3(tied), "qwen3_vl", f"made{end}")
            published = sources / f"published-qwen3_vl{end}"
            if not published.exists():
                folder.rename(published)
            model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(published, torch_dtype="auto")
            save(model, "qwen3_vl", f"saved-again{end}")
    result = {"transformers": transformers.__version__, "configs": found, "tensors": names}
    out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def without_paths(config: dict) -> dict:
    """The config without `_name_or_path`, which names a temporary folder."""
    return {
        key: without_paths(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "_name_or_path"
    }


def make_qwen2_5(tied: bool):
    text = {**TEXT, "eos_token_id": 442, **rope(1000000.0, {"mrope_section": [4, 6, 6]}, "mrope")}
    if VERSION < (4, 52):  # text settings at the root
        config = transformers.Qwen2_5_VLConfig(vision_config=VISION, tie_word_embeddings=tied, **text, **TOKENS)
    else:
        config = transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config=VISION, tie_word_embeddings=tied, **TOKENS
        )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def make_qwen3(tied: bool):
    text = {**TEXT3, "eos_token_id": 442, "tie_word_embeddings": tied}
    text |= rope(500000.0, {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}, "default")
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=VISION3, tie_word_embeddings=tied, **TOKENS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def rope(theta: float, section: dict, kind: str) -> dict:
    if VERSION >= (5, 0):
        return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **section}}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, "type": kind, **section}}


def write_positions(out: Path) -> None:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as code

    owner = code.Qwen2_5_VLModel if hasattr(code.Qwen2_5_VLModel, "get_rope_index") else None
    owner = owner or code.Qwen2_5_VLForConditionalGeneration
    config = transformers.Qwen2_5_VLConfig(vision_config={"tokens_per_second": 2})
    for name, index in TOKENS.items():
        setattr(config, name, index)
    found = {name: positions(owner, config, parts) for name, parts in PROMPTS.items()}
    out.write_text(json.dumps({"transformers": transformers.__version__, "positions": found}) + "\n")


def positions(owner: type, config, parts: list) -> dict:
    """Positions (3, n) and the first one of what is generated; None where the release fails."""
    ids: list[int] = []
    kinds: list[int] = []
    grids: dict[str, list] = {"image": [], "video": []}
    seconds: list[float] = []
    for part in parts:
        if isinstance(part, int):
            ids += [1] * part
            kinds += [0] * part
            continue
        kind, (t, h, w), second = part
        ids += [TOKENS["vision_start_token_id"], *[TOKENS[f"{kind}_token_id"]] * (t * h * w)]
        ids += [TOKENS["vision_end_token_id"]]
        kinds += [0, *[1 if kind == "image" else 2] * (t * h * w), 0]
        grids[kind].append([t, h * 2, w * 2])
        if kind == "video":
            seconds.append(second)
    bare = types.SimpleNamespace(config=config)
    if hasattr(owner, "get_vision_position_ids"):
        bare.get_vision_position_ids = types.MethodType(owner.get_vision_position_ids, bare)
    input_ids = torch.tensor([ids])
    arguments = {
        "input_ids": input_ids,
        "image_grid_thw": torch.tensor(grids["image"]) if grids["image"] else None,
        "video_grid_thw": torch.tensor(grids["video"]) if grids["video"] else None,
        "second_per_grid_ts": torch.tensor(seconds) if seconds else None,
        "attention_mask": torch.ones_like(input_ids),
    }
    if "mm_token_type_ids" in inspect.signature(owner.get_rope_index).parameters:
        arguments["mm_token_type_ids"] = torch.tensor([kinds])
    try:
        result, deltas = owner.get_rope_index(bare, **arguments)
    except StopIteration:  # 5.3 takes the seconds of a video for an image before it, and then has none left
        return {"positions": None, "next": None}
    return {"positions": result[:, 0].tolist(), "next": int(deltas.reshape(-1)[0]) + len(ids)}


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    if sys.argv[1] == "configs":
        write_configs(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        write_positions(Path(sys.argv[2]))
