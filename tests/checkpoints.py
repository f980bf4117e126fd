"""Tiny checkpoints of both families with random weights, in genuine Hugging Face layout, written without torch.

    folder = write_checkpoint(tmp_path / "model", "qwen3_vl")
    folder = write_checkpoint(tmp_path / "model", "qwen2_5_vl", dialect="4.57", names="old", shards=3, dtype="BF16")

The folder has everything that a download has: config, generation config, weights (one file or shards with an index), a
real byte-level BPE `tokenizer.json` with Qwen's special tokens, a chat template and both processor files. Tensor names
and shapes are written down here from the public checkpoints, not taken from the library under test.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxvr.media.patches import VisionInput

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY = 512  # rows of the embedding; the tokenizer fills fewer, as in the public checkpoints

CHAT_TEMPLATE = """\
{%- set media = namespace(images=0, videos=0) %}
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for item in message.content %}
            {%- if item.type == 'image' or 'image' in item %}
                {%- set media.images = media.images + 1 %}
                {%- if add_vision_id %}{{ 'Picture ' ~ media.images ~ ': ' }}{% endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif item.type == 'video' or 'video' in item %}
                {%- set media.videos = media.videos + 1 %}
                {%- if add_vision_id %}{{ 'Video ' ~ media.videos ~ ': ' }}{% endif %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in item %}
                {{- item.text }}
            {%- else %}
                {{- raise_exception('content of an unknown type: ' ~ (item | tojson)) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write_checkpoint(
    folder: Path,
    family: str = "qwen3_vl",
    *,
    dialect: str = "5",
    names: str = "new",
    shards: int = 1,
    dtype: str = "F32",
    tied: bool = False,
    seed: int = 0,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    weights: Callable[[str, np.ndarray], np.ndarray | None] | None = None,
) -> Path:
    """Write a checkpoint and return its folder.

    Args:
        folder: made if it does not exist.
        family: "qwen2_5_vl" or "qwen3_vl".
        dialect: how config.json is spelt: transformers "5", "4.57", or (Qwen2.5-VL) "first", its first release.
        names: tensor names, "new" (`model.language_model.`, `model.visual.`) or "old" (`model.`, `visual.`).
        shards: number of weight files; more than one also writes the index.
        dtype: of the weights: "F32", "F16" or "BF16".
        tied: whether the embedding serves as the output head.
        seed: of the random weights.
        text, vision: settings that replace those of `text_settings` and `vision_settings`.
        weights: called with (name, array) for each tensor; returns what to write instead, None to leave it out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text_config = {**text_settings(family), **(text or {})}
    vision_config = {**vision_settings(family), "out_hidden_size": text_config["hidden_size"], **(vision or {})}
    tokenizer = train_tokenizer(family)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    _write(folder / "config.json", make_config(family, text_config, vision_config, ids, dialect=dialect, tied=tied))
    _write(
        folder / "generation_config.json",
        {"do_sample": True, "temperature": 0.7, "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]},
    )
    tensors = random_tensors(family, text_config, vision_config, names=names, tied=tied, seed=seed)
    if weights is not None:
        changed = {name: weights(name, array) for name, array in tensors.items()}
        tensors = {name: array for name, array in changed.items() if array is not None}
    write_weights(folder, tensors, shards=shards, dtype=dtype)
    write_side_files(folder, family, vision_config)
    return folder


def overflow_float16(name: str, array: np.ndarray) -> np.ndarray:
    """For `weights`: float16 holds the weights but not the hidden states, which reach some 1e5."""
    return array * {"up_proj": 30.0, "down_proj": 2e4}.get(name.split(".")[-2], 1.0) if "layers." in name else array


def random_media(
    family: str,
    kind: str,
    grid: tuple[int, int, int],
    *,
    second_per_grid: float = 1.0,
    first: float = 0.25,
    seed: int = 0,
) -> VisionInput:
    """A video or an image of noise; row i of a video was filmed `first + i * second_per_grid` seconds in."""
    rows = math.prod(grid)
    values = 3 * 2 * vision_settings(family)["patch_size"] ** 2
    patches = np.random.default_rng(seed).integers(0, 256, (rows, values), dtype=np.uint8)
    if kind == "image":
        return VisionInput("image", patches, grid, (), 0.0)
    seconds = tuple(first + second_per_grid * row for row in range(grid[0]))
    return VisionInput("video", patches, grid, seconds, second_per_grid)


def write_side_files(folder: Path, family: str, vision: Mapping[str, Any] | None = None) -> None:
    """Write tokenizer, chat template and processor files, for example beside weights that transformers saved."""
    vision = vision or vision_settings(family)
    train_tokenizer(family).save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"},
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    new = family == "qwen3_vl"
    shared = {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "image_mean": [0.5, 0.5, 0.5] if new else [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.5, 0.5, 0.5] if new else [0.26862954, 0.26130258, 0.27577711],
    }
    token = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
    size = {"shortest_edge": 4 * token, "longest_edge": 1024 * token}
    image = {"image_processor_type": "Qwen2VLImageProcessorFast", "size": size}
    video_type = "Qwen3VLVideoProcessor" if new else "Qwen2VLVideoProcessor"
    video = {"video_processor_type": video_type, "size": size, "fps": 2, "min_frames": 4, "max_frames": 768}
    _write(folder / "preprocessor_config.json", {**image, **shared})
    _write(folder / "video_preprocessor_config.json", {**video, **shared})


def text_settings(family: str) -> dict[str, Any]:
    """Settings of the tiny language model, rope aside."""
    settings = {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }
    if family == "qwen3_vl":  # head_dim is a setting of its own: make it differ from hidden_size / heads
        settings |= {"attention_bias": False, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return settings


def vision_settings(family: str) -> dict[str, Any]:
    """Settings of the tiny vision tower."""
    settings = {
        "depth": 4,
        "hidden_size": 64,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": 64,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if family == "qwen3_vl":
        return settings | {
            "deepstack_visual_indexes": [0, 2],
            "hidden_act": "gelu_pytorch_tanh",
            "num_position_embeddings": 36,
            "patch_size": 16,
        }
    return settings | {
        "fullatt_block_indexes": [1, 3],
        "hidden_act": "silu",
        "patch_size": 14,
        "tokens_per_second": 2,
        "window_size": 112,
    }


def make_config(
    family: str,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    ids: Mapping[str, int],
    *,
    dialect: str = "5",
    tied: bool = False,
) -> dict[str, Any]:
    """`config.json` as the given release of transformers spells it."""
    new = family == "qwen3_vl"
    head = text["head_dim"] if new else text["hidden_size"] // text["num_attention_heads"]
    section = [share * head // 32 for share in ([6, 5, 5] if new else [4, 6, 6])]  # half a head
    theta = 500_000.0 if new else 1_000_000.0
    scaling: dict[str, Any] = {"mrope_section": section}
    if new:
        scaling["mrope_interleaved"] = True
    text, vision = dict(text), dict(vision)
    common = {
        "architectures": ["Qwen3VLForConditionalGeneration" if new else "Qwen2_5_VLForConditionalGeneration"],
        "image_token_id": ids["<|image_pad|>"],
        "model_type": family,
        "tie_word_embeddings": tied,
        "video_token_id": ids["<|video_pad|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }
    text["eos_token_id"] = ids["<|im_end|>"]
    if dialect == "5":
        text |= {"model_type": f"{family}_text"}
        text["rope_parameters"] = {"rope_theta": theta, "rope_type": "default", **scaling}
        vision |= {"model_type": f"{family}_vision", "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}}
        return {**common, "text_config": text, "vision_config": vision, "transformers_version": "5.23.0"}
    text |= {"rope_theta": theta, "rope_scaling": {"rope_type": "default", "type": "default", **scaling}}
    vision["model_type"] = family
    if dialect == "4.57" and new:
        text["model_type"] = "qwen3_vl_text"
        return {**common, "text_config": text, "vision_config": vision, "transformers_version": "4.57.1"}
    if dialect == "4.57":  # this family's text settings stood in both places
        nested = {**text, "model_type": "qwen2_5_vl_text", "tie_word_embeddings": tied}
        return {**text, **common, "text_config": nested, "vision_config": vision, "transformers_version": "4.57.1"}
    if dialect == "first" and not new:
        vision["in_chans"] = vision.pop("in_channels")
        text["rope_scaling"] = {"type": "mrope", "mrope_section": section}
        return {**text, **common, "vision_config": vision, "transformers_version": "4.41.2"}
    raise ValueError(f"{family} was never written in the dialect {dialect!r}")


def tensor_shapes(
    family: str, text: Mapping[str, Any], vision: Mapping[str, Any], *, names: str = "new", tied: bool = False
) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a public checkpoint with these settings."""
    new = family == "qwen3_vl"
    decoder, tower = ("model.language_model", "model.visual") if names == "new" else ("model", "visual")
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    head = text.get("head_dim") or hidden // text["num_attention_heads"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {f"{decoder}.embed_tokens.weight": (text["vocab_size"], hidden)}
    for index in range(text["num_hidden_layers"]):
        layer = f"{decoder}.layers.{index}"
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if not new:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, queries)
        if new:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (head,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (head,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes[f"{decoder}.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (text["vocab_size"], hidden)
    return shapes | _tower_shapes(tower, vision, new)


def random_tensors(
    family: str,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    *,
    names: str = "new",
    tied: bool = False,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Random weights of a size that keeps activations near one, so that errors show in the logits."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(family, text, vision, names=names, tied=tied).items():
        noise = draw.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            tensors[name] = noise * 0.1 + (0.0 if name.endswith("bias") else 1.0)
        elif "embed" in name and len(shape) == 2:
            tensors[name] = noise
        else:
            tensors[name] = noise / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
    return tensors


def write_weights(folder: Path, tensors: Mapping[str, np.ndarray], *, shards: int = 1, dtype: str = "F32") -> None:
    """Write tensors as one safetensors file, or as shards with an index."""
    if shards == 1:
        _write_shard(folder / "model.safetensors", tensors, dtype)
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        _write_shard(folder / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.size * (4 if dtype == "F32" else 2) for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write(folder / "model.safetensors.index.json", index)


@functools.cache
def train_tokenizer(family: str = "qwen3_vl"):
    """A byte-level BPE tokenizer with Qwen's splitting rule and special tokens, trained on a few sentences."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    rule = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    rule += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=440, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    if family == "qwen3_vl":  # single tokens there, and not special ones
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    assert tokenizer.get_vocab_size() <= VOCABULARY
    return tokenizer


def _tower_shapes(tower: str, vision: Mapping[str, Any], new: bool) -> dict[str, tuple[int, ...]]:
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{tower}.{name}.weight"] = (rows, columns)
        shapes[f"{tower}.{name}.bias"] = (rows,)

    def norm(name: str, width: int) -> None:
        shapes[f"{tower}.{name}.weight"] = (width,)
        if new:
            shapes[f"{tower}.{name}.bias"] = (width,)

    shapes[f"{tower}.patch_embed.proj.weight"] = (hidden, 3, vision["temporal_patch_size"], patch, patch)
    if new:
        shapes[f"{tower}.patch_embed.proj.bias"] = (hidden,)
        shapes[f"{tower}.pos_embed.weight"] = (vision["num_position_embeddings"], hidden)
    for block in range(vision["depth"]):
        at = f"blocks.{block}"
        norm(f"{at}.norm1", hidden)
        norm(f"{at}.norm2", hidden)
        linear(f"{at}.attn.qkv", 3 * hidden, hidden)
        linear(f"{at}.attn.proj", hidden, hidden)
        for name in ("linear_fc1",) if new else ("gate_proj", "up_proj"):
            linear(f"{at}.mlp.{name}", inner, hidden)
        linear(f"{at}.mlp.{'linear_fc2' if new else 'down_proj'}", hidden, inner)
    merged, out = 4 * hidden, vision["out_hidden_size"]
    if not new:
        norm("merger.ln_q", hidden)
        linear("merger.mlp.0", merged, merged)
        linear("merger.mlp.2", out, merged)
        return shapes
    levels = range(len(vision["deepstack_visual_indexes"]))
    for at, width in [("merger", hidden), *((f"deepstack_merger_list.{level}", merged) for level in levels)]:
        norm(f"{at}.norm", width)
        linear(f"{at}.linear_fc1", merged, merged)
        linear(f"{at}.linear_fc2", out, merged)
    return shapes


def _write_shard(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    """Spelt out, since safetensors' numpy writer knows no bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, end = [], 0
    for name, array in tensors.items():
        blobs.append(_to_bytes(array, dtype))
        begin, end = end, end + len(blobs[-1])
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(blobs))


def _to_bytes(array: np.ndarray, dtype: str) -> bytes:
    if dtype != "BF16":
        return np.ascontiguousarray(array, dtype={"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
    return (rounded >> 16).astype("<u2").tobytes()


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


_SENTENCES = (
    "You are a helpful assistant. Please answer the question about the video and the image.",
    "Put your final answer in \\boxed{}. Think through the reasoning, then answer again inside \\boxed{A}.",
    "Locate the start and end timestamps of the video segment, in seconds, with one decimal place.",
    "Question: what does the person hold? Options: A. a red ball B. a blue cup C. nothing",
    "<0.5 seconds> <1.5 seconds> <12.5 seconds> system user assistant",
    "At 4.2 seconds the left cup and the middle cup change places; the ball stays under the middle cup.",
)


def change_small_module(folder: Path) -> Path:
    """Change one number of a norm in a checkpoint, at a place that 64 samples of 1,024 bytes of the file miss."""
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    sampled = [len(content) * part // 64 for part in range(64)]
    for name, tensor in sorted(header.items()):
        first = 8 + length + tensor["data_offsets"][0] if "norm" in name else 0
        if first and not any(start <= first + 1 < start + 1024 for start in sampled):
            content[first + 1] ^= 1  # the low byte of a float32's fraction, or the sign and exponent of a bfloat16
            file.write_bytes(content)
            return folder
    raise ValueError(f"the samples hit every norm of {file}")
