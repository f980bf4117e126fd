"""The weights that an adapter was trained on: recorded in its `adapter_config.json`, and compared when it is loaded.

An adapter whose matrices have other shapes is refused. Matrices of the same shapes fit any weights of the architecture,
such as the same checkpoint at 4 bits instead of bfloat16, or another fine-tune of it. Somebody may want that, so it is
a warning and not an error.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxvr.checkpoint.folder import ModelFolder

__all__ = ["describe_base", "difference_of_bases", "warn_of_another_base"]

logger = logging.getLogger(__name__)


def describe_base(folder: ModelFolder) -> dict[str, Any]:
    """A description that distinguishes a model's weights from others; takes milliseconds.

    Returns:
        `{"sample": .., "bits": .., "dtype": ..}`: a hash of samples of the weights (`ModelFolder.sample`), the bits of
        a quantized model or None, and the dtype of unquantized tensors as safetensors names it, such as "BF16".
    """
    quantization = folder.config.get("quantization") or folder.config.get("quantization_config") or {}
    dtypes = {info.dtype for name, info in folder.tensors.items() if name.endswith("norm.weight")}
    return {
        "sample": folder.sample(),
        "bits": quantization.get("bits"),
        "dtype": ", ".join(sorted(dtypes)) or None,
    }


def difference_of_bases(config: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    """How the weights that an adapter was trained on differ from `base`; None: they do not, or it is unknown.

    Args:
        config: `adapter_config.json`.
        base: `describe_base` of the weights that the adapter is loaded onto.
    """
    trained = config.get("base")
    if not isinstance(trained, Mapping) or not base or trained.get("sample") in (None, base.get("sample")):
        return None
    here, there = _form(base), _form(trained)
    if here != there:
        return f"it was trained on weights of {there}, and these have {here}"
    return "it was trained on other weights than these"


def warn_of_another_base(adapter: Path, config: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Log a warning when an adapter is loaded onto other weights than those that it was trained on."""
    difference = difference_of_bases(config, base)
    if difference is not None:
        logger.warning(
            "the adapter %s fits, but %s: answers may differ from those that its training measured", adapter, difference
        )


def _form(base: Mapping[str, Any]) -> str:
    bits = base.get("bits")
    return f"{bits} bits" if bits else str(base.get("dtype"))
