"""A model folder on disk, checked before any weight is loaded.

`ModelFolder.open` reads JSON files and safetensors headers, so that a missing shard, a truncated download or a tensor
of a wrong shape is one clear line after milliseconds, not a failure after minutes. It reads the folders of
transformers, mlxvr and mlx-vlm alike, and does not need MLX.
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
from mlxvr.checkpoint.safetensors import TensorInfo, holds_the_same
from mlxvr.checkpoint.shard_headers import INDEX, read_tensors
from mlxvr.errors import CheckpointError
from mlxvr.model.families.base import Family, family_of
from mlxvr.storage.content_hash import FileStamp, hash_files, stamp_of

__all__ = ["ModelFolder", "TensorInfo"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFolder:
    """The files of a checkpoint, read and consistent with each other.

    Attributes:
        path: the folder.
        config: `config.json` as it is; `family.mlx_config(config)` normalises it.
        family: the architecture's own rules.
        tensors: every tensor by its name on disk.
        image_processor: `preprocessor_config.json` (or transformers 5's `processor_config.json`); None: there is none.
        video_processor: `video_preprocessor_config.json` (or `processor_config.json`); None: there is none.
        generation_config: `generation_config.json`, {} if there is none.
        tokenizer_config: `tokenizer_config.json`, {} if there is none.
        tokenizer_path: `tokenizer.json`.
        chat_template: Jinja source, None if the folder has none.
        settings: `mlxvr.json` of a converted folder, {} if there is none.
        prefixes: (prefix on disk, its replacement) for tensor names with an unusual spelling; the first that matches a
            name is used.
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

        Raises `CheckpointError` when `path` is not a folder, when `config.json` or `tokenizer.json` is missing or
        unreadable, when the architecture is unsupported, and when weights are missing, truncated, damaged or pickled.
        """
        folder = Path(path)
        if not folder.is_dir():
            problem = "is a file" if folder.exists() else "does not exist"
            raise CheckpointError(f"{folder} {problem}: give the folder of a model, with its config.json")
        config = _read_json(folder / "config.json")
        if config is None:
            raise CheckpointError(
                f"{folder} has no config.json: it is not a model folder, or its download is not complete"
            )
        family = family_of(config)
        _refuse_foreign_quantization(folder, config)
        tensors = read_tensors(folder, _read_json(folder / INDEX))
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
        """The folder with an untied config, if config.json ties head and embedding but their tensors differ.

        transformers 4.57 ignores `tie_word_embeddings` at the root, so it may write such a folder; transformers 5 reads
        it in this way too.
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
        _log.warning("%s: config.json ties the output head to the embedding, but they differ: both are used", self.path)
        return dataclasses.replace(self, config=config_normalization.untie(self.config))

    def mlx_key(self, name: str, *, tied: bool) -> str | None:
        """MLX's name of the tensor `name`, see `Family.mlx_key`."""
        prefix, becomes = next((pair for pair in self.prefixes if name.startswith(pair[0])), ("", ""))
        return self.family.mlx_key(becomes + name[len(prefix) :], tied=tied)

    def mlx_names(self) -> dict[str, str]:
        """Name on disk -> MLX name, for the tensors that the network uses."""
        tied = bool(self.family.mlx_config(self.config)["tie_word_embeddings"])
        named = ((name, self.mlx_key(name, tied=tied)) for name in self.tensors)
        return {name: key for name, key in named if key is not None}

    def mlx_tensors(self) -> dict[str, TensorInfo]:
        """The tensors that the network uses, by their MLX names; their shapes are those on disk."""
        return {key: self.tensors[name] for name, key in self.mlx_names().items()}

    def check_shapes(self) -> None:
        """Compare every tensor, quantized ones included, with the shapes that the architecture needs.

        Raises `CheckpointError` that names the tensor. Unused tensors are only logged.
        """
        tensors, expected = self.mlx_tensors(), self.family.expected_shapes(self.config)
        companions: set[str] = set()
        for key, shape in expected.items():
            if key not in tensors:
                raise CheckpointError(
                    f"{self.path} lacks the tensor {key} {list(shape)}: its files do not belong to its config.json, or "
                    "its download is not complete"
                )
            wanted = {key: shape}
            if tensors[key].dtype == "U32":
                wanted = _packed_shapes(key, shape, self.quantization_of(key.removesuffix(".weight")))
            elif tensors[key].dtype == "F8_E4M3":
                blocks = zip(shape, self.fp8_block, strict=True)
                wanted = {key: shape, f"{key}_scale_inv": tuple(-(-size // block) for size, block in blocks)}
            companions |= wanted.keys() - {key}
            for name, size in wanted.items():
                if name not in tensors:
                    raise CheckpointError(f"{self.path} lacks {name}, without which {key} cannot be unpacked")
                actual = self.family.mlx_shape(name, tensors[name].shape)
                if actual != size:
                    raise CheckpointError(
                        f"{tensors[name].file}: {name} has the shape {list(actual)}, expected {list(size)} by "
                        "config.json: the files do not belong together"
                    )
        for key in sorted(tensors.keys() - expected.keys() - companions):
            _log.warning("%s holds %s, which the network does not use", self.path, key)

    @property
    def fp8_block(self) -> tuple[int, int]:
        """Rows and columns of a block of 8-bit floats that share a scale.

        Raises `CheckpointError` when `config.json` does not state them.
        """
        block = (self.config.get("quantization_config") or {}).get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
            raise CheckpointError(
                f"{self.path} has 8-bit float weights, but config.json has no weight_block_size: get the bf16 release"
            )
        return block[0], block[1]

    def quantization_of(self, module: str) -> dict[str, Any]:
        """`{"bits", "group_size", "mode"}` of a quantized module, by its MLX path.

        Raises `CheckpointError` when `config.json` does not state how its tensors are packed.
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
        """The files of its tensors, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    def fingerprint(self) -> str:
        """A short hash of everything that answers depend on: all bytes of weights, config, tokenizer and processors.

        The first call reads the weights, unless the Hub's cache has their hashes; this takes about a second per
        gigabyte, see `mlxvr.storage.content_hash`. `mlxvr.json` is not included: a threshold may be measured later.
        """
        files: list[Any] = [self.config, self.generation_config, self.image_processor, self.video_processor]
        described = [*files, self.chat_template, self.tokenizer_config]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        digest.update(self.tokenizer_path.read_bytes())
        for file, content in hash_files(self.weights_files).items():
            digest.update(f"{file.name} {content}".encode())
        return digest.hexdigest()[:32]

    def identify_later(self) -> Callable[[], str]:
        """Record the state of the weights' files now; return a function that computes the `fingerprint` later.

        The function raises `CheckpointError` when a file has changed since: the loaded weights are then not on disk.
        """
        stamps = [stamp_of(file) for file in self.weights_files]

        def fingerprint() -> str:
            changed = [stamp[0] for stamp in stamps if not _is_still(stamp)]
            if changed:
                raise CheckpointError(f"{changed[0]} has changed since the model was loaded: load it again")
            return self.fingerprint()

        return fingerprint

    def sample(self) -> str:
        """A short hash of config, sizes and samples of the weights: takes milliseconds, but does not see all bytes."""
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
    """Whether a file still exists unchanged."""
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
    """Raise `CheckpointError` for AWQ, GPTQ and similar formats, whose scales nothing here would read."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "fp8") and "quantization" not in config:
        raise CheckpointError(
            f"{folder} is quantized already ({method}), in a format that is not MLX's: get the release in bf16 and "
            "convert that"
        )


def _find_tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json: copy it from the checkpoint that the model comes from")
    return path


def _find_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template, from the places where transformers stores it, in its order of preference."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template = (_read_json(folder / "chat_template.json") or {}).get("chat_template")
    template = template or tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _packed_shapes(key: str, shape: tuple[int, ...], how: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a quantized matrix: `bits` per weight in 32-bit words, and a scale (and bias) per group."""
    *outputs, inputs = shape
    module = key.removesuffix(".weight")
    packed = {key: (*outputs, inputs * how["bits"] // 32)}
    packed[f"{module}.scales"] = (*outputs, inputs // how["group_size"])
    if how["mode"] == "affine":
        packed[f"{module}.biases"] = packed[f"{module}.scales"]
    return packed
