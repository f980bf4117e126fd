"""Loading: from a model folder to a `VideoModel`.

Problems of a folder are found before weights are read (see `folder`). Weights are mapped, renamed and laid out lazily,
so that loading reads the files once and makes no second copy of them.

`quantization` in the `config.json` of a quantized folder describes how each module is packed, as in mlx-lm and mlx-vlm.
"""

import logging
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.checkpoint.fp8 import unpack_fp8
from mlxvr.checkpoint.recipe import DTYPES
from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.model.adapter import Adapter, apply_adapter
from mlxvr.model.adapter_base import describe_base, warn_of_another_base
from mlxvr.model.network import VideoModel
from mlxvr.model.tokenizer import ChatTokenizer
from mlxvr.runtime.device_lock import use_device
from mlxvr.runtime.device_memory import avoid_cpu_compiler

__all__ = ["load_model", "map_weights", "weight_bytes"]

# Bytes of a number in memory, by safetensors' name of its dtype; fp8 is unpacked to bfloat16. Other dtypes are packed.
_LOADED_AS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 2, "F8_E4M3FN": 2}

_log = logging.getLogger(__name__)


@use_device()
def load_model(
    folder: str | PathLike[str] | ModelFolder,
    *,
    adapter: str | PathLike[str] | None = None,
    dtype: str | None = None,
    lazy: bool = False,
) -> VideoModel:
    """Load a model from disk, without using the network.

    Args:
        folder: in the layout of transformers, mlxvr or mlx-vlm; quantized or not (blocks of 8-bit floats are unpacked
            to bfloat16).
        adapter: folder of a LoRA adapter, of mlxvr, mlx-vlm, mlx-lm or PEFT (see `adapter_layouts`).
        dtype: one of `DTYPES`, for computing and for unpacked weights; None: as on disk.
        lazy: leave each weight on disk until it is first used, for callers who never use all at once.

    Raises:
        CheckpointError: a file is missing, damaged, unsupported, unsafe or does not fit the others.
        ConfigError: `dtype` is unknown.
    """
    _check_dtype(dtype)
    opened = folder if isinstance(folder, ModelFolder) else ModelFolder.open(folder)
    opened.check_shapes()
    if opened.chat_template is None:
        raise CheckpointError(
            f"{opened.path} has no chat template: copy chat_template.jinja (or tokenizer_config.json) from the "
            "checkpoint that the model comes from"
        )
    avoid_cpu_compiler()
    config = opened.family.mlx_config(opened.config)
    spec = opened.family.vision_spec(config, opened.image_processor, opened.video_processor)
    tokenizer = _load_tokenizer(opened, config)
    network = opened.family.build(config)
    weights = map_weights(opened)
    _prepare_quantized(network, opened, weights)
    network.load_weights(list(weights.items()), strict=True)
    find_model, parts = opened.identify_later(), {}
    base = describe_base(opened)
    if adapter is not None:
        warn_of_another_base(Path(adapter), Adapter.open(Path(adapter)).config, base)
        parts["adapter"] = apply_adapter(network, Path(adapter))
    if dtype is not None:
        network.set_dtype(getattr(mx, dtype))
        parts["dtype"] = dtype
    network.eval()
    if not lazy:
        mx.eval(network.parameters())
    _log.info("loaded %s (%s)", opened.path, opened.family.name)
    return VideoModel(
        network,
        opened.family,
        config,
        spec=spec,
        tokenizer=tokenizer,
        folder=opened,
        identify=lambda: {"model": find_model(), **parts},
        base=base,
    )


def weight_bytes(folder: ModelFolder, *, dtype: str | None = None) -> int:
    """Bytes of the weights in memory once they are loaded; `dtype` and its error are those of `load_model`."""
    _check_dtype(dtype)
    total = 0
    modules = {key.rpartition(".")[0] for key in folder.family.expected_shapes(folder.config)}
    for key, tensor in folder.mlx_tensors().items():
        if key.rpartition(".")[0] not in modules or key.endswith(".weight_scale_inv"):
            continue
        size = _LOADED_AS.get(tensor.dtype)
        if size is not None and dtype is not None:
            size = getattr(mx, dtype).size
        begin, end = tensor.offsets
        total += end - begin if size is None else math.prod(tensor.shape) * size
    return total


def map_weights(folder: ModelFolder) -> dict[str, mx.array]:
    """Every tensor that the network uses, by its MLX name, in MLX's layout; each is read on first use."""
    names = folder.mlx_names()
    arrays: dict[str, mx.array] = {}
    for file in sorted({info.file for info in folder.tensors.values()}):
        try:
            loaded = cast("dict[str, mx.array]", mx.load(str(file), format="safetensors"))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{file} cannot be loaded: {error}") from error
        arrays |= {
            names[name]: folder.family.mlx_tensor(names[name], array) for name, array in loaded.items() if name in names
        }
    for key in [key for key in arrays if key.endswith(".weight_scale_inv")]:
        weight, scales = key.removesuffix("_scale_inv"), arrays.pop(key)
        arrays[weight] = unpack_fp8(arrays[weight], scales, folder.fp8_block).astype(mx.bfloat16)
    modules = {key.rpartition(".")[0] for key in folder.family.expected_shapes(folder.config)}
    return {key: array for key, array in arrays.items() if key.rpartition(".")[0] in modules}


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")


def _prepare_quantized(network: nn.Module, folder: ModelFolder, weights: Mapping[str, mx.array]) -> None:
    """Replace the modules whose weights are packed by quantized layers."""

    def how(path: str, _: nn.Module) -> bool | dict[str, Any]:
        return folder.quantization_of(path) if f"{path}.scales" in weights else False

    if not any(key.endswith(".scales") for key in weights):
        return
    try:
        nn.quantize(network, class_predicate=how)
    except ValueError as error:
        raise CheckpointError(f"{folder.path} is quantized in a way that MLX does not support: {error}") from error


def _load_tokenizer(folder: ModelFolder, config: Mapping[str, Any]) -> ChatTokenizer:
    """The tokenizer with its template and with every token that some file names as the end of a turn."""
    texts = {
        key: value["content"] if isinstance(value, Mapping) else value
        for key, value in folder.tokenizer_config.items()
        if key.endswith("_token") and (isinstance(value, str) or (isinstance(value, Mapping) and "content" in value))
    }
    tokenizer = ChatTokenizer(folder.tokenizer_path, chat_template=folder.chat_template, special_texts=texts)
    ends: set[int] = set()
    for eos in (folder.generation_config.get("eos_token_id"), config["text_config"].get("eos_token_id")):
        ends.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    named = tokenizer.special_ids.get(texts.get("eos_token", ""))
    if named is not None:
        ends.add(named)
    if not ends:
        raise CheckpointError(
            f"{folder.path} does not define the token that ends an answer: its generation_config.json is missing"
        )
    tokenizer.eos_ids = frozenset(ends)
    rows = int(config["text_config"]["vocab_size"])
    if tokenizer.vocabulary_size > rows:
        raise CheckpointError(
            f"{folder.tokenizer_path} has {tokenizer.vocabulary_size} tokens, but the model's embedding has {rows} "
            "rows: the files do not belong together"
        )
    return tokenizer
