"""A loaded model: vision tower, language model, and their config, tokenizer and frame rules.

The weights and layers are mlx-vlm's. Three things are done here instead:

- Every forward pass gets explicit positions and calls the inner decoder, which respects mask and positions; the outer
  call of mlx-vlm 0.7.10 keeps rope state between calls and drops masks.
- The output head runs only for the logits that are needed, and in float32.
- Visual features are inserted for images and videos alike, in order of appearance; a chunk of a prompt gets its own
  part of them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.errors import Cancelled
from mlxvr.media.patches import VisionInput, normalise
from mlxvr.media.spec import VisionSpec
from mlxvr.model import cache as kv
from mlxvr.model.families.base import Family
from mlxvr.model.head import Head
from mlxvr.model.prompt import SYSTEM_PROMPT
from mlxvr.model.tokenizer import ChatTokenizer
from mlxvr.model.vision_tower import SCORES_AT_ONCE, run_tower
from mlxvr.runtime.hooks import Progress, ShouldStop

__all__ = ["PATCHES_AT_ONCE", "VideoModel", "VisionFeatures", "temporal_patches_at_once"]


# Patches that go through the vision tower at once. Temporal patches are independent: this only bounds memory.
PATCHES_AT_ONCE = 16_384
_VISION_PAD = "<|vision_pad|>"  # config.json does not name it


@dataclass(frozen=True, eq=False)
class VisionFeatures:
    """The vision tower's output for a prompt's media.

    Attributes:
        embeds: (n, hidden), one row per visual token in the order of the prompt.
        deepstack: for each of the first language layers that take visual features, the array to add: (n, hidden).
    """

    embeds: mx.array
    deepstack: list[mx.array] = field(default_factory=list)

    def __getitem__(self, rows: slice) -> "VisionFeatures":
        """The features of some of the visual tokens."""
        return VisionFeatures(self.embeds[rows], [level[rows] for level in self.deepstack])

    def __len__(self) -> int:
        return int(self.embeds.shape[0])


class VideoModel:
    """A model of any family, ready to run; made by `mlxvr.model.loading.load_model`.

    Attributes:
        family: the architecture's own rules.
        config: `config.json`, normalised.
        spec: frame rules of the checkpoint's processor files.
        system_prompt: VideoAuto-R1's, until it is set to the checkpoint's own, which `mlxvr.checkpoint.defaults` knows.
        tokenizer: with the chat template.
        folder: the folder that it was loaded from; None for parts of a model.
        network: mlx-vlm's module, for training and conversion.
        base: description of its weights (`adapter_base.describe_base`); {} where it is unknown.
        head: computes the logits.
    """

    def __init__(
        self,
        network: Any,
        family: Family,
        config: dict[str, Any],
        *,
        spec: VisionSpec,
        tokenizer: ChatTokenizer,
        folder: ModelFolder | None = None,
        identify: Callable[[], Mapping[str, str]] | None = None,
        base: Mapping[str, Any] | None = None,
    ):
        """Put the parts together; usually called by `load_model`. `identify` computes `parts` on first use."""
        self.network = network
        self.family = family
        self.config = config
        self.spec = spec
        self.tokenizer = tokenizer
        self.system_prompt = SYSTEM_PROMPT
        self.folder = folder
        self.base = dict(base or {})
        self.head = Head()
        self._identify = identify

    @functools.cached_property
    def parts(self) -> dict[str, str]:
        """The parts of the fingerprint: "model", and "adapter" and "dtype" if `load_model` got them.

        Raises `CheckpointError` when a weights file cannot be read or has changed since it was loaded.
        """
        return dict(self._identify()) if self._identify is not None else {"model": ""}

    @property
    def fingerprint(self) -> str:
        """Identifies the weights; computed on first use (see `ModelFolder.fingerprint`)."""
        return "".join(self.parts.values())

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a turn."""
        return self.tokenizer.eos_ids

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together."""
        return int(self.config["text_config"]["max_position_embeddings"])

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype in which the layers compute."""
        dtype: mx.Dtype = self.layers[0].input_layernorm.weight.dtype
        return dtype

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Tokens that stand for visual features in a prompt."""
        return (int(self.config["image_token_id"]), int(self.config["video_token_id"]))

    @property
    def suppress_tokens(self) -> frozenset[int]:
        """Tokens that are never written: visual placeholders and their start and end mean nothing in an answer."""
        edges = (int(self.config["vision_start_token_id"]), int(self.config["vision_end_token_id"]))
        padding = self.tokenizer.special_ids.get(_VISION_PAD)
        return frozenset({*self.placeholder_ids, *edges, *([] if padding is None else [padding])}) - self.eos_ids

    @property
    def layers(self) -> list[Any]:
        """The language model's layers."""
        layers: list[Any] = self.network.language_model.model.layers
        return layers

    @property
    def key_shape(self) -> tuple[int, int]:
        """Number of heads of keys and values, and the size of a head."""
        return int(self.config["text_config"]["num_key_value_heads"]), self.family.head_dim(self.config)

    def make_cache(self, kv_bits: int | None = None) -> list[Any]:
        """An empty KV cache; see `mlxvr.model.cache.make`."""
        key_heads, head_dim = self.key_shape
        repeats = int(self.config["text_config"]["num_attention_heads"]) // key_heads
        dtype = self.layers[0].input_layernorm.weight.dtype
        return kv.make(len(self.layers), head_dim=head_dim, kv_bits=kv_bits, dtype=dtype, repeats=repeats)

    def encode(
        self,
        media: Sequence[VisionInput],
        *,
        progress: Progress | None = None,
        should_stop: ShouldStop | None = None,
        patches_at_once: int = PATCHES_AT_ONCE,
    ) -> VisionFeatures:
        """Run the vision tower over media, some temporal patches at a time.

        Args:
            media: in the order of the prompt.
            progress: called with ("vision", temporal patches done, temporal patches in all).
            should_stop: asked before each chunk.
            patches_at_once: bounds the memory; the result does not depend on it.

        Returns:
            Features of all visual tokens, evaluated.

        Raises `Cancelled` when `should_stop` says so.
        """
        total, done = sum(medium.grid[0] for medium in media), 0
        chunks: list[VisionFeatures] = []
        for medium in media:
            frames, height, width = medium.grid
            per_frame = height * width
            step = temporal_patches_at_once(self.config["vision_config"], per_frame, patches_at_once)
            plan = self.family.frame_plan(self.config, height, width)
            for first in range(0, frames, step):
                if should_stop is not None and should_stop():
                    raise Cancelled("the clip was cancelled while the model looked at it")
                last = min(first + step, frames)
                pixels = mx.array(normalise(medium.patches[first * per_frame : last * per_frame], self.spec))
                embeds, deep = run_tower(
                    self.network.vision_tower,
                    pixels,
                    last - first,
                    plan,
                    scores_at_once=SCORES_AT_ONCE,
                    should_stop=should_stop,
                )
                mx.eval(embeds, deep)
                chunks.append(VisionFeatures(embeds, deep))
                done += last - first
                if progress is not None:
                    progress("vision", done, total)
        return _joined(chunks)

    def embed(
        self,
        ids: mx.array,
        *,
        features: VisionFeatures | None = None,
        media_mask: np.ndarray | None = None,
    ) -> mx.array:
        """Embeddings of ids (b, n), with visual features where `media_mask` (b, n) is True: (b, n, hidden).

        `features` has one row for each True, in the order of the flattened mask.
        """
        embeds: mx.array = self.network.language_model.model.embed_tokens(ids)
        # MLX unpacks its floating-point formats to bfloat16, whatever the rest of the network computes in.
        embeds = embeds.astype(self.dtype)
        if features is None or media_mask is None or not media_mask.any():
            return embeds
        where = mx.array(np.flatnonzero(media_mask).astype(np.int32))
        flat = embeds.reshape(-1, embeds.shape[-1])
        flat[where] = features.embeds.astype(embeds.dtype)
        return flat.reshape(embeds.shape)

    def hidden(
        self,
        ids: mx.array,
        positions: mx.array,
        *,
        cache: list[Any] | None = None,
        mask: mx.array | str | None = None,
        features: VisionFeatures | None = None,
        media_mask: np.ndarray | None = None,
        embeds: mx.array | None = None,
    ) -> mx.array:
        """Run the language model, without its head.

        Args:
            ids: int32 (b, n).
            positions: int32 (3, b, n), the rope positions of these tokens.
            cache: is read and extended; None: no context.
            mask: None: causal attention; else a mask of `mx.fast.scaled_dot_product_attention` over the tokens in the
                cache and these tokens.
            features: of the visual tokens among `ids`.
            media_mask: bool (b, n), True for visual tokens.
            embeds: (b, n, hidden), used instead of `embed(ids, ...)`.

        Returns:
            (b, n, hidden), normalised, in the dtype of the weights.
        """
        if embeds is None:
            embeds = self.embed(ids, features=features, media_mask=media_mask)
        extra: dict[str, Any] = {}
        if features is not None and features.deepstack and media_mask is not None and media_mask.any():
            levels = [level.astype(embeds.dtype) for level in features.deepstack]
            extra = self.family.deepstack_arguments(levels, media_mask)
        out: mx.array = self.network.language_model.model(
            ids, inputs_embeds=embeds, mask=mask, cache=cache, position_ids=positions, **extra
        )
        return out

    def logits(self, hidden: mx.array) -> mx.array:
        """The output head: (.., hidden) -> (.., vocab), float32 for any dtype of the weights (see `head`)."""
        language = self.network.language_model
        tied = self.config["tie_word_embeddings"]
        return self.head(language.model.embed_tokens if tied else language.lm_head, hidden)


def _joined(chunks: Sequence[VisionFeatures]) -> VisionFeatures:
    if len(chunks) == 1:
        return chunks[0]
    embeds = mx.concatenate([chunk.embeds for chunk in chunks])
    deep = [mx.concatenate(list(level)) for level in zip(*(chunk.deepstack for chunk in chunks))]
    mx.eval(embeds, deep)
    return VisionFeatures(embeds, deep)


def temporal_patches_at_once(
    vision: Mapping[str, Any], frame_patches: int, patches_at_once: int = PATCHES_AT_ONCE
) -> int:
    """How many temporal patches of a clip go through the vision tower at once; at least one.

    Args:
        vision: `vision_config` of the model.
        frame_patches: patches of a temporal patch.
        patches_at_once: the most patches; the attention scores of a layer are bounded by `SCORES_AT_ONCE` as well.
    """
    scores = int(vision["num_heads"]) * frame_patches**2
    return max(1, min(patches_at_once // frame_patches, SCORES_AT_ONCE // scores))
