"""The public sizes of both families: each resolves to its family's recipe, and its conversion is planned to the byte.

The checkpoints are real in everything but their content: the public configs' shapes, safetensors headers, and files
whose data are holes on the disk.
"""

import json
from pathlib import Path

import pytest
from checkpoints import make_config, tensor_shapes, text_settings, train_tokenizer, vision_settings, write_side_files

from mlxvr.checkpoint import recipe
from mlxvr.conversion.shards import MAX_SHARD_BYTES
from mlxvr.conversion.source import Checkpoint
from mlxvr.conversion.tensor_plan import make_plan

# From the public config.json files: layers, hidden, intermediate, heads, key heads, vocabulary, tied.
TEXT = {
    "Qwen2.5-VL-3B": ("qwen2_5_vl", 36, 2048, 11008, 16, 2, 151936, True),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", 28, 3584, 18944, 28, 4, 152064, False),
    "Qwen2.5-VL-32B": ("qwen2_5_vl", 64, 5120, 27648, 40, 8, 152064, False),
    "Qwen3-VL-2B": ("qwen3_vl", 28, 2048, 6144, 16, 8, 151936, True),
    "Qwen3-VL-4B": ("qwen3_vl", 36, 2560, 9728, 32, 8, 151936, True),
    "Qwen3-VL-8B": ("qwen3_vl", 36, 4096, 12288, 32, 8, 151936, False),
    "Qwen3-VL-32B": ("qwen3_vl", 64, 5120, 25600, 64, 8, 151936, False),
}
VISION = {
    "Qwen2.5-VL-3B": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    "Qwen2.5-VL-7B": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    "Qwen2.5-VL-32B": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3456, "num_heads": 16},
    "Qwen3-VL-2B": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16},
    "Qwen3-VL-4B": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16},
    "Qwen3-VL-8B": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16},
    "Qwen3-VL-32B": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16},
}


def write_hollow(folder: Path, size: str) -> Path:
    """A checkpoint in bfloat16 of the public shapes whose data take no room on the disk."""
    family, layers, hidden, inner, heads, key_heads, vocabulary, tied = TEXT[size]
    text = {
        **text_settings(family),
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "head_dim": 128,
    }
    vision = {**vision_settings(family), **VISION[size], "out_hidden_size": hidden}
    if family == "qwen3_vl":
        vision |= {"num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]}
    tokenizer = train_tokenizer(family)
    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_end|>", "<|endoftext|>")
    ids = {token: tokenizer.token_to_id(token) for token in special}
    ids |= {token: tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|vision_pad|>")}
    folder.mkdir()
    config = make_config(family, text, vision, ids, dialect="4.57", tied=tied)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in tensor_shapes(family, text, vision, names="new", tied=tied).items():
        numbers = 1
        for axis in shape:
            numbers *= axis
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * numbers]}
        end += 2 * numbers
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    write_side_files(folder, family, vision)
    return folder


@pytest.mark.parametrize("size", TEXT)
def test_every_public_size_is_planned(size, tmp_path):
    checkpoint = Checkpoint.open(write_hollow(tmp_path / size, size))
    found = recipe.for_config(checkpoint.folder.config)
    assert found.name == TEXT[size][0]
    billions = float(size.rpartition("-")[2].removesuffix("B"))
    assert 0.8 * billions < checkpoint.parameters / 1e9 < 1.4 * billions
    sizes = {}
    for bits in (4, 6, 8, 0):
        plan = make_plan(checkpoint, found.with_quantization(bits=bits).precision, "bfloat16")
        sizes[bits] = plan.nbytes
        written = [sum(tensor.nbytes for tensor in tensors) for tensors in plan.shards.values()]
        assert sum(written) == plan.nbytes
        largest = max(tensor.nbytes for tensors in plan.shards.values() for tensor in tensors)
        assert max(written) <= max(MAX_SHARD_BYTES, largest) <= 5e9
        assert not plan.indivisible
    assert sizes[0] == checkpoint.nbytes
    assert sizes[4] < sizes[6] < sizes[8] < sizes[0]


def test_the_8b_checkpoint_by_hand(tmp_path):
    checkpoint = Checkpoint.open(write_hollow(tmp_path / "8B", "Qwen3-VL-8B"))
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 12288  # q, o; k, v; gate, up, down
    matrices = 36 * layer + 2 * 151936 * 4096  # embeddings and head
    rest = checkpoint.parameters - matrices
    plan = make_plan(checkpoint, recipe.for_config(checkpoint.folder.config).precision, "bfloat16")
    down, head = 36 * 4096 * 12288, 151936 * 4096
    packed = matrices * (4 + 32 / 64) + down * 2 + head * 4  # 4 bits and two bfloat16 numbers for 64; 6 and 8 bits
    assert plan.nbytes == packed / 8 + 2 * rest
    assert plan.bits == (4 * matrices + 2 * down + 4 * head) / matrices
    assert 6e9 < plan.nbytes < 7e9
    assert len(plan.shards) >= 5
