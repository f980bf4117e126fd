"""A row as the prompt of a rollout and of its loss: tokens, positions and visual features.

The vision tower is frozen, so its features are computed once here, outside every gradient, and serve the rollout and
all passes of the loss.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxvr.data.prefetch import load_row
from mlxvr.data.rows import Row
from mlxvr.errors import ConfigError, DataError
from mlxvr.media import VisionInput, VisionSpec
from mlxvr.model.network import VideoModel, VisionFeatures
from mlxvr.model.prompt import Prompt, build_prompt
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["EncodedPrompt", "encode_row", "refuse_length", "write_prompt"]


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedPrompt:
    """A prompt, ready for the language model.

    Attributes:
        row: the row whose question it asks.
        ids: int32 (P,).
        positions: int32 (3, P), rope positions.
        media_mask: bool (P,), the visual tokens.
        features: of the visual tokens, in order; None without media.
        next_position: position of the first token of a completion.
    """

    row: Row
    ids: np.ndarray
    positions: np.ndarray
    media_mask: np.ndarray
    features: VisionFeatures | None
    next_position: int


def encode_row(
    model: VideoModel,
    row: Row,
    *,
    spec: VisionSpec | None = None,
    max_prompt_tokens: int | None = None,
    vision: VisionInput | None = None,
    should_stop: ShouldStop | None = None,
) -> EncodedPrompt:
    """Read what a row shows, run the vision tower over it, and write its question as a prompt.

    Args:
        model: the policy.
        row: of a dataset.
        spec: how frames are sampled and sized; None: the model's own.
        max_prompt_tokens: the most tokens; None: the model's context.
        vision: the result of `load_row` with the same `spec`, if the row was read ahead.
        should_stop: asked between frames and between chunks of them.

    Raises:
        DataError: the prompt is too long, or a folder of frames holds none; the message begins with the row's line.
        MediaError: what the row shows cannot be read.
        Cancelled: `should_stop` said so.
    """
    if vision is None:
        vision = load_row(row, spec or model.spec, should_stop=should_stop)
    prompt = write_prompt(model, row, vision)
    if max_prompt_tokens is not None and len(prompt.ids) > max_prompt_tokens:
        raise DataError(refuse_length(row, len(prompt.ids), int(prompt.media_mask.sum()), max_prompt_tokens))
    features = model.encode(prompt.media, should_stop=should_stop) if prompt.media else None
    if features is not None:
        mx.eval(features.embeds, features.deepstack)
    return EncodedPrompt(
        row=row,
        ids=prompt.ids,
        positions=prompt.positions,
        media_mask=prompt.media_mask,
        features=features,
        next_position=prompt.next_position,
    )


def refuse_length(row: Row, tokens: int, visual: int, limit: int) -> str:
    """The message for a prompt that is longer than the limit."""
    return (
        f"{row.line}: the prompt has {tokens} tokens, {visual} of them visual, and the limit is {limit}: raise "
        "--max-prompt-tokens, or lower --video-tokens"
    )


def write_prompt(model: VideoModel, row: Row, vision: VisionInput | None) -> Prompt:
    """A row's question about what it shows, as tokens; the vision tower does not run.

    Raises `DataError`, beginning with the row's line, when the prompt is longer than the model's context.
    """
    try:
        return build_prompt(
            model.tokenizer,
            model.family,
            model.config,
            [] if vision is None else [vision],
            row.text,
            options=row.options,
            kind=row.ask_kind,
            response_prefix=row.response_prefix,
            system=model.system_prompt,
        )
    except ConfigError as error:  # the row's question, or its length
        raise DataError(f"{row.line}: {error}") from error
