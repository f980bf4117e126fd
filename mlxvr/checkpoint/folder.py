"""A model folder on disk, judged before anything of it is loaded.

`ModelFolder.open` reads JSON files and safetensors headers, so that a missing shard, a truncated download or a tensor
of the wrong shape is one clear line after milliseconds instead of a failure after minutes. It serves three kinds of
folder alike: as transformers writes it, as mlxvr converts it, as mlx-vlm converts it. MLX is not needed.

Weights come from safetensors only. A pickle (`.bin`, `.pt`) can run any code while it is read, so it is never opened.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from mlxvr.checkpoint import config_normalization
from mlxvr.checkpoint.safetensors import TensorInfo, holds_the_same, read_header
from mlxvr.errors import CheckpointError
from mlxvr.model.families.base import Family, family_of
from mlxvr.storage.content_hash import FileStamp, hash_files, stamp_of
from mlxvr.storage.paths import list_visible

__all__ = ["ModelFolder", "TensorInfo"]

_log = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_NOT_THE_MODEL = ("adapter", "consolidated", "optimizer", "training")


@dataclass(frozen=True)
class ModelFolder:
    """The files of a checkpoint, read and found consistent with each other.

    Attributes:
        path: the folder.
        config: `config.json` as it is; `family.mlx_config(config)` normalises it.
        family: the architecture's adapter.
        tensors: every tensor by the name that it has on disk.
        image_processor: `preprocessor_config.json` (or transformers 5's `processor_config.json`); None: there is none.
        video_processor: `video_preprocessor_config.json` (likewise).
        generation_config: `generation_config.json`, {} if there is none.
        tokenizer_config: `tokenizer_config.json`, {} if there is none.
        tokenizer_path: `tokenizer.json`.
        chat_template: Jinja source, None if the folder has none.
        settings: `mlxvr.json` of a converted folder, {} if there is none.
        prefixes: (prefix on disk, prefix to read it as) of tensor names that are spelt in a way of their own; the first
            that fits is taken.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    tensors: dict[str, TensorInfo]
    image_processor: dict[str, Any] | None
    video_processor: dict[str, Any] | None
    generation_config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    tokenizer_path: Path
    chat_template: str | None
    settings: dict[str, Any]
    prefixes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def open(cls, path: str | PathLike[str], *, prefixes: Sequence[tuple[str, str]] = ()) -> "ModelFolder":
        """Read and check a folder; `prefixes` see above.

        Raises `CheckpointError`: not a folder, no or unreadable `config.json`, an unsupported architecture, weights
        that are missing, truncated, damaged or only there as pickles, no `tokenizer.json`.
        """
        folder = Path(path)
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise CheckpointError(f"{folder} {what}: give the folder of a model, with its config.json")
        config = _read_json(folder / "config.json")
        if config is None:
            raise CheckpointError(
                f"{folder} has no config.json: it is not a model folder, or its download is not complete"
            )
        family = family_of(config)
        _refuse_foreign_quantization(folder, config)
        tensors = _read_weights(folder)
        nested = _read_json(folder / "processor_config.json")
        tokenizer_config = _read_json(folder / "tokenizer_config.json") or {}
        opened = cls(
            path=folder,
            config=config,
            family=family,
            tensors=tensors,
            image_processor=_read_json(folder / "preprocessor_config.json") or nested,
            video_processor=_read_json(folder / "video_preprocessor_config.json") or nested,
            generation_config=_read_json(folder / "generation_config.json") or {},
            tokenizer_config=tokenizer_config,
            tokenizer_path=_find_tokenizer(folder),
            chat_template=_find_chat_template(folder, tokenizer_config),
            settings=_read_json(folder / "mlxvr.json") or {},
            prefixes=tuple(prefixes),
        )
        return opened._with_its_own_head()

    def _with_its_own_head(self) -> "ModelFolder":
        """The folder read as untied, if its head differs from the embedding that config.json says serves as one.

        transformers 4.57 ignores `tie_word_embeddings` at the root, so a model that it saves may have such a folder;
        transformers 5 reads it in this way too.
        """
        if not config_normalization.is_tied(self.config):
            return self
        named = {self.mlx_key(name, tied=False): info for name, info in self.tensors.items()}
        head, embedding = (
            named.get("language_model.lm_head.weight"),
            named.get("language_model.model.embed_tokens.weight"),
        )
        if head is None or embedding is None or holds_the_same(head, embedding):
            return self
        _log.warning("%s: config.json ties the output head to the embedding, and they differ: each is used", self.path)
        return dataclasses.replace(self, config=config_normalization.untie(self.config))

    def mlx_key(self, name: str, *, tied: bool) -> str | None:
        """MLX's name of the tensor `name`, see `Family.mlx_key`."""
        known, becomes = next((pair for pair in self.prefixes if name.startswith(pair[0])), ("", ""))
        return self.family.mlx_key(becomes + name[len(known) :], tied=tied)

    def mlx_names(self) -> dict[str, str]:
        """Name on disk -> MLX name, of the tensors that the network uses."""
        tied = bool(self.family.mlx_config(self.config)["tie_word_embeddings"])
        named = ((name, self.mlx_key(name, tied=tied)) for name in self.tensors)
        return {name: key for name, key in named if key is not None}

    def mlx_tensors(self) -> dict[str, TensorInfo]:
        """The tensors that the network uses, by their MLX names; the shapes are those on disk."""
        return {key: self.tensors[name] for name, key in self.mlx_names().items()}

    def check_shapes(self) -> None:
        """Compare every tensor with what the architecture needs, quantized ones included.

        Raises `CheckpointError` that names the tensor. Tensors that nothing needs are only logged.
        """
        found, expected = self.mlx_tensors(), self.family.expected_shapes(self.config)
        companions: set[str] = set()
        for key, shape in expected.items():
            if key not in found:
                raise CheckpointError(
                    f"{self.path} lacks the tensor {key} {list(shape)}: its files do not belong to its config.json, or "
                    "its download is not complete"
                )
            wanted = {key: shape}
            if found[key].dtype == "U32":
                wanted = _packed_shapes(key, shape, self.quantization_of(key.removesuffix(".weight")))
            elif found[key].dtype == "F8_E4M3":
                blocks = zip(shape, self.fp8_block, strict=True)
                wanted = {key: shape, f"{key}_scale_inv": tuple(-(-size // block) for size, block in blocks)}
            companions |= wanted.keys() - {key}
            for name, size in wanted.items():
                if name not in found:
                    raise CheckpointError(f"{self.path} lacks {name}, without which {key} cannot be unpacked")
                actual = self.family.mlx_shape(name, found[name].shape)
                if actual != size:
                    raise CheckpointError(
                        f"{found[name].file}: {name} has the shape {list(actual)}, expected {list(size)} by "
                        "config.json: the files do not belong together"
                    )
        for key in sorted(found.keys() - expected.keys() - companions):
            _log.warning("%s holds %s, which the network does not use", self.path, key)

    @property
    def fp8_block(self) -> tuple[int, int]:
        """Rows and columns of a block of 8-bit floats that shares a scale.

        Raises `CheckpointError` when `config.json` does not say so.
        """
        block = (self.config.get("quantization_config") or {}).get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            raise CheckpointError(
                f"{self.path} has 8-bit float weights and its config.json no weight_block_size: get the bf16 release"
            )
        return block[0], block[1]

    def quantization_of(self, module: str) -> dict[str, Any]:
        """`{"bits", "group_size", "mode"}` of a quantized module, by its MLX path.

        Raises `CheckpointError` when `config.json` does not say how its tensors are packed.
        """
        whole = self.config.get("quantization") or self.config.get("quantization_config") or {}
        own = whole.get(module)
        settings = {**whole, **own} if isinstance(own, Mapping) else whole
        if not isinstance(settings.get("bits"), int) or not isinstance(settings.get("group_size"), int):
            raise CheckpointError(
                f"{self.path / 'config.json'} does not say how {module} is quantized: convert the checkpoint again"
            )
        return {
            "bits": settings["bits"],
            "group_size": settings["group_size"],
            "mode": settings.get("mode", "affine"),
        }

    @property
    def weights_files(self) -> list[Path]:
        """The files that hold its tensors, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    def fingerprint(self) -> str:
        """A short hash of all that answers depend on: every byte of the weights, config, tokenizer and processors.

        The first call reads weights that the Hub's cache does not vouch for, which takes about a second a gigabyte; see
        `mlxvr.storage.content_hash`. `mlxvr.json` is no part of it: a threshold may be measured and written later.
        """
        files: list[Any] = [self.config, self.generation_config, self.image_processor, self.video_processor]
        described = [*files, self.chat_template, self.tokenizer_config]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        digest.update(self.tokenizer_path.read_bytes())
        for file, content in hash_files(self.weights_files).items():
            digest.update(f"{file.name} {content}".encode())
        return digest.hexdigest()[:32]

    def identify_later(self) -> Callable[[], str]:
        """Remember the weights' files as they are now; the result gives the `fingerprint`, once, when it is asked.

        It raises `CheckpointError` when a file has changed since: what was loaded is then no longer on disk.
        """
        stamps = [stamp_of(file) for file in self.weights_files]

        def fingerprint() -> str:
            changed = [stamp[0] for stamp in stamps if not _is_still(stamp)]
            if changed:
                raise CheckpointError(f"{changed[0]} has changed since the model was loaded: load it again")
            return self.fingerprint()

        return fingerprint

    def sample(self) -> str:
        """A short hash of config, sizes and samples of the weights: milliseconds, and blind to what lies between."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.weights_files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as data:
                for part in range(64):
                    data.seek(size * part // 64)
                    digest.update(data.read(1024))
        return digest.hexdigest()[:32]


def _is_still(stamp: FileStamp) -> bool:
    """Whether a file is there as it was."""
    try:
        return stamp_of(Path(stamp[0])) == stamp
    except OSError:
        return False


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): download or copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object: download it again")
    return value


def _refuse_foreign_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    """AWQ, GPTQ and the like keep their scales in tensors that would be overlooked."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "fp8") and "quantization" not in config:
        raise CheckpointError(
            f"{folder} is quantized already ({method}), in a way that is not MLX's: get the release in bf16 and "
            "convert that"
        )


def _read_weights(folder: Path) -> dict[str, TensorInfo]:
    """Headers of the shards that the index names, or of the folder's only weights file(s)."""
    index = _read_json(folder / _INDEX)
    present = {
        file.name: file for file in list_visible(folder, "*.safetensors") if not file.name.startswith(_NOT_THE_MODEL)
    }
    if index is None:
        if not present:
            raise _no_weights(folder)
        return _merge(folder, {name: read_header(file) for name, file in sorted(present.items())})
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / _INDEX} has no usable weight_map: download it again")
    shards = sorted(set(weight_map.values()))
    if missing := [name for name in shards if name not in present]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder} lacks the shard {missing[0]}{more}: its download is not complete")
    if extra := sorted(name for name in present.keys() - set(shards) if name.startswith("model")):
        raise CheckpointError(
            f"{folder} holds {extra[0]}, which its index does not know: remove what is left of another download"
        )
    headers = {name: read_header(present[name]) for name in shards}
    for tensor, name in weight_map.items():
        if tensor not in headers[name]:
            raise CheckpointError(
                f"{folder / name} does not hold {tensor}, which the index says it does: download both again"
            )
    return _merge(folder, headers)


def _merge(folder: Path, headers: Mapping[str, dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        if twice := sorted(tensors.keys() & header.keys()):
            other = tensors[twice[0]].file.name
            raise CheckpointError(
                f"{folder}: both {other} and {file} hold {twice[0]}: remove the one that does not belong"
            )
        tensors |= header
    return tensors


def _no_weights(folder: Path) -> CheckpointError:
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
        for file in list_visible(folder, pattern):
            return CheckpointError(
                f"{folder} has its weights as a pickle only ({file.name}), which can run code when it is read and is "
                "never loaded: get a release with .safetensors files, or save it again with safe_serialization"
            )
    return CheckpointError(f"{folder} has no .safetensors file: its download is not complete")


def _find_tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json: copy it from the checkpoint that the model comes from")
    return path


def _find_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template from wherever transformers keeps it, in its own order of preference."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    found = (_read_json(folder / "chat_template.json") or {}).get("chat_template")
    found = found or tokenizer_config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _packed_shapes(key: str, shape: tuple[int, ...], how: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a quantized matrix: `bits` to each weight in 32-bit words, a scale (and bias) for each group."""
    *outputs, inputs = shape
    module = key.removesuffix(".weight")
    packed = {key: (*outputs, inputs * how["bits"] // 32)}
    packed[f"{module}.scales"] = (*outputs, inputs // how["group_size"])
    if how["mode"] == "affine":
        packed[f"{module}.biases"] = packed[f"{module}.scales"]
    return packed
