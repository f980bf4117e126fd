"""What may differ between two families of networks: one interface, and the registry of those that are known.

A family is an architecture (Qwen2.5-VL, Qwen3-VL): one file beside this one holds all that is particular to it, and a
recipe of the same name (`convert/`) says how it is quantized. The rest of mlxvr asks the family and never its name.
A family holds facts and no state.

What all families have in common is what mlx-vlm's networks have in common:

    modules            `vision_tower`, `language_model.model.embed_tokens`, `.layers`, `.norm`, `language_model.lm_head`
    a decoder layer    `input_layernorm`, `self_attn` (`q_proj`, `k_proj`, `v_proj`, `o_proj`, `rotary_emb`),
                       `post_attention_layernorm`, `mlp` (`gate_proj`, `up_proj`, `down_proj`)
    a normalised       `text_config` and `vision_config` complete, the four token ids of media, `tie_word_embeddings`
    config             (see `mlxvr.checkpoint.config_normalization`)

Importing this file loads neither MLX nor mlx-vlm: a checkpoint's files are judged without them.
"""

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mlxvr.checkpoint.config_normalization import ConfigRules, normalise
from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.media.patches import VisionInput
from mlxvr.media.spec import FrameRules, VisionSpec
from mlxvr.model.frame_plan import FramePlan
from mlxvr.model.positions import VisionBlock, rope_positions

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["FAMILIES", "Attend", "Family", "Shapes", "family_of", "mlx_name", "register", "titles", "token_grid"]

Shapes = dict[str, tuple[int, ...]]

# By name, in the order in which they were registered; `register` adds to it.
FAMILIES: dict[str, "Family"] = {}


class Family(ABC):
    """An architecture; `family_of(config)` is the one that a checkpoint belongs to.

    Attributes:
        name: what `model_type` in config.json says.
        title: its name for people.
        config_rules: what its config.json leaves out, and what its network does not implement.
        frame_rules: what its processor files leave out.
        has_head_norms: queries and keys are normalised head by head before they are rotated.
        evaluation_limits: frames and tokens that its published evaluations give, over those that all families share
            (`mlxvr.data.benchmarks`); values for `VisionSpec.with_overrides`.
        benchmark_frames: by the name of a benchmark, `max_frames` where it differs from `evaluation_limits`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    config_rules: ClassVar[ConfigRules]
    frame_rules: ClassVar[FrameRules]
    has_head_norms: ClassVar[bool]
    evaluation_limits: ClassVar[Mapping[str, int]]
    benchmark_frames: ClassVar[Mapping[str, int]] = {}

    # config.json and the processors' files

    def mlx_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config.json` as stock mlx-vlm spells it, whichever release wrote it.

        Raises `CheckpointError` for a setting that is missing or not implemented.
        """
        return normalise(config, self.config_rules)

    def vision_spec(
        self,
        config: Mapping[str, Any],
        image_processor: Mapping[str, Any] | None = None,
        video_processor: Mapping[str, Any] | None = None,
    ) -> VisionSpec:
        """What a checkpoint expects of its pictures; arguments and errors are those of `VisionSpec.from_files`."""
        return VisionSpec.from_files(self.frame_rules, config, image_processor, video_processor)

    def benchmark_limits(self, benchmark: str) -> dict[str, int]:
        """`evaluation_limits` for the benchmark of this name."""
        frames = self.benchmark_frames.get(benchmark)
        return {**self.evaluation_limits, **({} if frames is None else {"max_frames": frames})}

    # tensors

    def mlx_key(self, hf_name: str, *, tied: bool = False) -> str | None:
        """MLX's name of a tensor in any public spelling; names that are MLX's already stay as they are.

        Returns None for a tensor that the network does not use: buffers that some releases wrote to disk, and the
        output head if `tied` says that the embedding serves as one.
        """
        if hf_name.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", ".position_ids")):
            return None
        name = mlx_name(hf_name)
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

    def expected_shapes(self, config: Mapping[str, Any]) -> Shapes:
        """MLX name -> shape of every tensor of the unquantized network.

        They are read off a network that is built and never evaluated: a 72B network takes 60 ms and 60 KB. The first
        call in a process also imports mlx-vlm (some seconds), as loading does.
        """
        full = self.mlx_config(config)
        key = json.dumps([self.name, full["text_config"], full["vision_config"]], sort_keys=True)
        if key not in _shapes:
            _shapes[key] = _lazy_shapes(self, full)
            while len(_shapes) > _SHAPES_KEPT:
                _shapes.popitem(last=False)
        return dict(_shapes[key])

    # the network

    @abstractmethod
    def network_code(self) -> Any:
        """The module of mlx-vlm that has `Model` and its configuration classes; imported when it is asked for."""

    def build(self, config: Mapping[str, Any]) -> Any:
        """The network (an mlx-vlm `Model`) with weights yet to be loaded."""
        code, full = self.network_code(), self.mlx_config(config)
        text = code.TextConfig.from_dict(full["text_config"])  # the dataclasses take the keys that they know
        vision = code.VisionConfig.from_dict(full["vision_config"])
        settings = code.ModelConfig(
            text_config=text,
            vision_config=vision,
            model_type=full["model_type"],
            image_token_id=full["image_token_id"],
            video_token_id=full["video_token_id"],
            vision_start_token_id=full["vision_start_token_id"],
            vision_end_token_id=full["vision_end_token_id"],
            vocab_size=text.vocab_size,
        )
        return code.Model(settings)

    def head_dim(self, config: Mapping[str, Any]) -> int:
        """Numbers in a head of the language model, from a normalised config."""
        text = config["text_config"]
        return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])

    def deepstack_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """The layers of the vision tower whose features are added after the first language layers, one after each."""
        return ()

    # what a prompt shows

    @abstractmethod
    def vision_layout(self, media: VisionInput, config: Mapping[str, Any]) -> list[VisionBlock]:
        """How a video or an image is written in the prompt: its vision blocks in order."""

    def positions(
        self, config: Mapping[str, Any], media_mask: np.ndarray, blocks: Sequence[VisionBlock]
    ) -> tuple[np.ndarray, int]:
        """Rope positions of a prompt; arguments and result are those of `rope_positions`."""
        return rope_positions(media_mask, blocks)

    @abstractmethod
    def frame_plan(self, config: Mapping[str, Any], height: int, width: int) -> FramePlan:
        """How the vision tower goes over a frame of height x width patches, from a normalised config."""

    # layers that are run one by one

    def deepstack_arguments(self, levels: Sequence["mx.array"], media_mask: np.ndarray) -> dict[str, Any]:
        """The keywords by which mlx-vlm's decoder takes visual features for its first layers.

        Args:
            levels: for each of these layers, what is added after it: (visual tokens, hidden).
            media_mask: bool (b, n), True for visual tokens.
        """
        raise ValueError(f"{self.name} has no layers that take visual features, and {len(levels)} were given")

    def decoder(self, network: Any, layers: Sequence[Any]) -> Any:
        """A language model of some of a network's layers, without a norm after them; it shares their weights."""
        import mlx.nn as nn

        whole = network.language_model.model
        decoder = type(whole)(replace(whole.args, num_hidden_layers=0))
        decoder.layers, decoder.norm = list(layers), nn.Identity()
        return decoder

    def attention(self, module: Any, hidden: "mx.array", positions: "mx.array", attend: "Attend") -> "mx.array":
        """A layer's self-attention, for training: as mlx-vlm computes it, with `attend` in the middle.

        Args:
            module: the layer's `self_attn`.
            hidden: (1, n, hidden), normalised.
            positions: int32 (3, 1, n).
            attend: takes queries, keys and values, (1, heads, n, head_dim), and the scale of the scores.

        Returns:
            (1, n, hidden).
        """
        length = hidden.shape[1]

        def split(projected: "mx.array", heads: int) -> "mx.array":  # (1, n, heads * head_dim) -> (1, n, heads, ..)
            return projected.reshape(1, length, heads, -1)

        queries = split(module.q_proj(hidden), module.n_heads)
        keys = split(module.k_proj(hidden), module.n_kv_heads)
        values = split(module.v_proj(hidden), module.n_kv_heads)
        if self.has_head_norms:
            queries, keys = module.q_norm(queries), module.k_norm(keys)
        queries, keys, values = (array.transpose(0, 2, 1, 3) for array in (queries, keys, values))
        queries, keys = module.rotary_emb.apply_rotary(queries, keys, positions)
        mixed = attend(queries, keys, values, module.scale)
        out: mx.array = module.o_proj(mixed.transpose(0, 2, 1, 3).reshape(1, length, -1))
        return out


Attend = Callable[["mx.array", "mx.array", "mx.array", float], "mx.array"]


def register(family: Family) -> None:
    """Make a family known, for all of mlxvr; it also needs a recipe (`mlxvr.checkpoint.recipe.register`).

    Raises `ConfigError` when another family has its name.
    """
    known = FAMILIES.setdefault(family.name, family)
    if type(known) is not type(family):
        raise ConfigError(f"two families are called {family.name!r}: {type(known)} and {type(family)}; rename one")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint, by its `config.json`.

    Raises `CheckpointError` when it belongs to none.
    """
    model_type = config.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise CheckpointError(
        f"the checkpoint's model_type is {model_type!r}; supported are {' and '.join(FAMILIES)}: choose a "
        f"{titles(' or a ')} checkpoint"
    )


def titles(joint: str) -> str:
    """The families' titles, for people, with `joint` between two of them."""
    return joint.join(family.title for family in FAMILIES.values())


def mlx_name(public_name: str) -> str:
    """A tensor's or module's MLX name, from any public spelling."""
    for spelling, ours in _PREFIXES:
        if public_name.startswith(spelling):
            return ours + public_name[len(spelling) :]
    return public_name


def token_grid(media: VisionInput, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(t, h, w) of a medium in tokens."""
    merge = config["vision_config"].get("spatial_merge_size", 2)
    t, h, w = media.grid
    return t, h // merge, w // merge


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

_SHAPES_KEPT = 8  # of the networks that were asked for last
_shapes: OrderedDict[str, Shapes] = OrderedDict()


def _lazy_shapes(family: Family, config: Mapping[str, Any]) -> Shapes:
    """Build a network without evaluating it, and look at its parameters.

    Its random weights are never drawn. MLX's global random state goes on, as it does when a model is loaded; nothing
    here depends on it.
    """
    from mlx.utils import tree_flatten

    from mlxvr.runtime.device_lock import use_device

    with use_device():
        parameters: Any = tree_flatten(family.build(config).parameters())
    return {key: tuple(array.shape) for key, array in parameters}
