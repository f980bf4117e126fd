"""The two architectures: what differs between Qwen2.5-VL and Qwen3-VL, and nothing else.

An adapter holds facts (how a video is written in the prompt, how tensors are named and laid out, which settings the
network reads) and no state. A third architecture is one more adapter here, its shapes in `shapes` and its dialect in
`dialects`.

                            Qwen2.5-VL                          Qwen3-VL
    a video in the prompt   one vision block                    "<1.5 seconds>" and a block for each temporal row
    temporal position       floor(row * seconds * rate), mrope  the text order of the blocks
    vision attention        windows, and whole frames in some   whole frames, with features handed to early layers
    pictures                patch 14, CLIP's mean and std       patch 16, 0.5 and 0.5
"""

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlxvr.checkpoint import config_normalization
from mlxvr.errors import CheckpointError
from mlxvr.media.patches import VisionInput
from mlxvr.model import shapes
from mlxvr.model.mrope import MRopeConvention

__all__ = ["FAMILIES", "Family", "Qwen3VL", "Qwen25VL", "VisionBlock", "family_of"]

Shapes = dict[str, tuple[int, ...]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisionBlock:
    """A run of visual tokens between one vision-start and one vision-end token.

    Attributes:
        label: text before the vision-start token.
        grid: (t, h, w) in tokens: t temporal rows of h x w tokens.
        time_step: temporal positions from one row to the next, before rounding down.
    """

    label: str
    grid: tuple[int, int, int]
    time_step: float

    @property
    def tokens(self) -> int:
        """How many visual tokens the block holds."""
        t, h, w = self.grid
        return t * h * w


class Family(ABC):
    """An architecture; use `family_of(config)` to get the one that a checkpoint belongs to."""

    name: ClassVar[str]

    def mlx_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config.json` as stock mlx-vlm spells it, from any dialect (see `mlxvr.checkpoint.config_normalization`).

        Raises `CheckpointError` for a setting that is missing or not implemented.
        """
        return config_normalization.normalise(config, self.name)

    def mlx_key(self, hf_name: str, *, tied: bool = False) -> str | None:
        """MLX's name of a tensor in any public spelling; names that are MLX's already stay as they are.

        Returns None for a tensor that the network does not use: buffers that some releases wrote to disk, and the
        output head if `tied` says that the embedding serves as one.
        """
        if hf_name.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", ".position_ids")):
            return None
        name = hf_name
        for spelling, ours in _PREFIXES:
            if name.startswith(spelling):
                name = ours + name[len(spelling) :]
                break
        return None if tied and name.startswith("language_model.lm_head.") else name

    def mlx_tensor(self, key: str, array: Any) -> Any:
        """A tensor in MLX's layout; works on anything with `.shape` and `.transpose`, and is idempotent.

        Only the patch embedding differs: PyTorch keeps the three colours second, MLX last.
        """
        if key == "vision_tower.patch_embed.proj.weight" and len(array.shape) == 5 and array.shape[1] == 3:
            return array.transpose(0, 2, 3, 4, 1)
        return array

    def mlx_shape(self, key: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that `mlx_tensor` gives."""
        if key == "vision_tower.patch_embed.proj.weight" and len(shape) == 5 and shape[1] == 3:
            return (shape[0], *shape[2:], shape[1])
        return tuple(shape)

    def is_vision(self, key: str) -> bool:
        """Whether a tensor (by its MLX name) belongs to the vision tower."""
        return key.startswith("vision_tower.")

    @abstractmethod
    def expected_shapes(self, config: Mapping[str, Any]) -> Shapes:
        """MLX name -> shape of every tensor of the unquantized network."""

    @abstractmethod
    def build(self, config: Mapping[str, Any]) -> Any:
        """The network (an mlx-vlm `Model`) with weights yet to be loaded."""

    @abstractmethod
    def vision_layout(self, media: VisionInput, config: Mapping[str, Any]) -> list[VisionBlock]:
        """How a video or an image is written in the prompt: its vision blocks in order."""


class Qwen25VL(Family):
    """Qwen2.5-VL (arXiv 2502.13923)."""

    name = "qwen2_5_vl"

    def expected_shapes(self, config: Mapping[str, Any]) -> Shapes:
        """MLX name -> shape of every tensor of the unquantized network."""
        full = self.mlx_config(config)
        text = full["text_config"]
        head_dim = text["hidden_size"] // text["num_attention_heads"]
        language = shapes.language_shapes(text, qkv_bias=True, head_norms=False, head_dim=head_dim)
        return language | shapes.qwen2_5_vision_shapes(full["vision_config"])

    def build(self, config: Mapping[str, Any]) -> Any:
        """The network (an mlx-vlm `Model`) with weights yet to be loaded."""
        from mlx_vlm.models import qwen2_5_vl as code

        return _build(code, self.mlx_config(config))

    def vision_layout(self, media: VisionInput, config: Mapping[str, Any]) -> list[VisionBlock]:
        """One block; how far apart a video's rows lie in time is a matter of release (`mlxvr.model.mrope`)."""
        vision = config["vision_config"]
        grid = _token_grid(media, vision)
        if media.kind == "image":
            return [VisionBlock("", grid, 1.0)]
        rate = vision.get("tokens_per_second", 4)
        step = MRopeConvention.of_config(config).time_step(media.second_per_grid, rate)
        if step == 0.0 < media.second_per_grid and grid[0] > 1:
            _warn_of_one_time()
        return [VisionBlock("", grid, step)]


class Qwen3VL(Family):
    """Qwen3-VL, the dense sizes."""

    name = "qwen3_vl"

    def expected_shapes(self, config: Mapping[str, Any]) -> Shapes:
        """MLX name -> shape of every tensor of the unquantized network."""
        full = self.mlx_config(config)
        text = full["text_config"]
        language = shapes.language_shapes(text, qkv_bias=False, head_norms=True, head_dim=text["head_dim"])
        return language | shapes.qwen3_vision_shapes(full["vision_config"])

    def build(self, config: Mapping[str, Any]) -> Any:
        """The network (an mlx-vlm `Model`) with weights yet to be loaded."""
        from mlx_vlm.models import qwen3_vl as code

        return _build(code, self.mlx_config(config))

    def vision_layout(self, media: VisionInput, config: Mapping[str, Any]) -> list[VisionBlock]:
        """A block for each temporal row of a video, each after the row's source time; one block for an image."""
        t, h, w = _token_grid(media, config["vision_config"])
        if media.kind == "image":
            return [VisionBlock("", (t, h, w), 1.0)]
        if len(media.seconds) != t:
            raise ValueError(f"the video has {t} temporal rows and {len(media.seconds)} times for them")
        return [VisionBlock(f"<{seconds:.1f} seconds>", (1, h, w), 1.0) for seconds in media.seconds]


FAMILIES: tuple[Family, ...] = (Qwen25VL(), Qwen3VL())


def family_of(config: Mapping[str, Any]) -> Family:
    """The adapter of a checkpoint, by its `config.json`.

    Raises `CheckpointError` when it belongs to neither family.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type == family.name:
            return family
    supported = " and ".join(family.name for family in FAMILIES)
    raise CheckpointError(
        f"the checkpoint's model_type is {model_type!r}; supported are {supported}: choose a Qwen2.5-VL or a dense "
        "Qwen3-VL checkpoint"
    )


# Public spelling -> ours; the first that fits is taken, so longer prefixes come first.
_PREFIXES = (
    ("model.language_model.", "language_model.model."),  # transformers 4.52 and later
    ("model.visual.", "vision_tower."),
    ("language_model.", "language_model."),  # MLX's own: nothing to do
    ("vision_tower.", "vision_tower."),
    ("visual.", "vision_tower."),  # Qwen2.5-VL's first release
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def _build(code: Any, config: dict[str, Any]) -> Any:
    """Make mlx-vlm's network from a normalised config; the dataclasses take the keys that they know."""
    text = code.TextConfig.from_dict(config["text_config"])
    vision = code.VisionConfig.from_dict(config["vision_config"])
    settings = code.ModelConfig(
        text_config=text,
        vision_config=vision,
        model_type=config["model_type"],
        image_token_id=config["image_token_id"],
        video_token_id=config["video_token_id"],
        vision_start_token_id=config["vision_start_token_id"],
        vision_end_token_id=config["vision_end_token_id"],
        vocab_size=text.vocab_size,
    )
    return code.Model(settings)


@functools.cache  # once a process, not at every question
def _warn_of_one_time() -> None:
    _log.warning(
        "more than 2 frames a second: this checkpoint counts whole seconds from one pair of frames to the next, so all "
        "of the clip's frames have the same time for it; give fps=2 or less"
    )


def _token_grid(media: VisionInput, vision: Mapping[str, Any]) -> tuple[int, int, int]:
    merge = vision.get("spatial_merge_size", 2)
    t, h, w = media.grid
    return t, h // merge, w // merge
