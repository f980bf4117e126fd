"""Prompts: the texts that VideoAuto-R1 was trained with, as tokens with positions and visual placeholders.

A prompt is the system prompt, then the media, then the question, wrapped by the checkpoint's chat template. Since the
media come before the question, all questions about the same media share a prefix, up to the last vision block.

The question is the user's text and is read literally: special tokens that it spells stay plain text (see `tokenizer`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np

from mlxvr.checkpoint.config_normalization import text_settings
from mlxvr.data.option_letters import strip_letters
from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.media.patches import VisionInput
from mlxvr.model.families.base import Family
from mlxvr.model.positions import VisionBlock
from mlxvr.model.tokenizer import ChatTokenizer

__all__ = ["KINDS", "SYSTEM_PROMPT", "Prompt", "build_prompt", "evaluation_copy", "question_text"]

# The training copy (arXiv 2601.05175, public scripts): five lines; see `evaluation_copy`.
SYSTEM_PROMPT = "\n".join(
    (
        "You are a helpful assistant.",
        r"FIRST: Output your initial answer inside the first \boxed{...} without any analysis or explanations. "
        r"If you cannot determine the answer without reasoning, "
        r"output \boxed{Let's analyze the problem step by step.} instead.",
        "THEN: Think through the reasoning as an internal monologue enclosed within <think>...</think>.",
        r"AT LAST: Output the final answer again inside \boxed{...}. "
        "If you believe the previous answer was correct, repeat it; otherwise, correct it.",
        r"Output format: \boxed{...}<think>...</think>\boxed{...}",
    )
)
KINDS = ("qa", "grounding", "grounded_qa")

_GROUNDING = (
    "Locate the start and end timestamps of the video segment corresponding to the description: {text} "
    "Please provide the start and end timestamps (in seconds, precise to one decimal places) "
    r"in the format \boxed{{[start, end]}}."
)
_GROUNDED_QA = (
    "Please answer the question, and then provide the video segment that best supports your answer. "
    "The start and end timestamps must be in seconds with exactly one decimal place.\n"
    r"Output format: \boxed{answer <> [start, end]}. For example: \boxed{A <> [20.3, 30.8]}."
)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt, ready for the network.

    Attributes:
        ids: int32 (n,).
        positions: int32 (3, n): time, height, width.
        media: the media of the visual tokens, in order.
        media_mask: bool (n,), True for visual tokens.
        prefix_length: tokens up to the end of the last vision block: the same for every question about these media.
        next_position: rope position of the first generated token.
        response_prefix_ids: the last of `ids`, a given beginning of the answer; empty: the model writes all of it.
    """

    ids: np.ndarray
    positions: np.ndarray
    media: tuple[VisionInput, ...]
    media_mask: np.ndarray
    prefix_length: int
    next_position: int
    response_prefix_ids: tuple[int, ...] = ()


def evaluation_copy(system: str) -> str:
    """A system prompt as in the public evaluator: VideoAuto-R1's gets one more newline at its end, others stay."""
    return f"{system}\n" if system == SYSTEM_PROMPT else system


def question_text(question: str, options: Sequence[str] | None = None, kind: str = "qa") -> str:
    """The user's text of a prompt, in the words of the public training data.

    Args:
        question: the question, or for "grounding" the description of the segment to find.
        options: up to 26 choices; if each already has its letter (`A. red`, `B. blue`), the letters are removed.
        kind: "qa", "grounding" or "grounded_qa".

    Raises `ConfigError` for an empty question, an unknown kind, or options that cannot be lettered.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
    if not question.strip():
        raise ConfigError("the question is empty: ask something, for example 'What happens at the end?'")
    choices = _lettered(options)
    if kind == "grounding":
        if choices:
            raise ConfigError("a grounding question has no options: leave them out, or use the kind 'grounded_qa'")
        return _GROUNDING.format(text=question)
    if kind == "grounded_qa":
        listed = f"Options:\n{choices}\n" if choices else ""
        return f"Question: {question}\n{listed}{_GROUNDED_QA}"
    listed = f"\nOptions:\n{choices}" if choices else ""
    return f"{question}{listed}\nPut your final answer in \\boxed{{}}."


def build_prompt(  # 9 parameters: rows and probes have no `AskRequest`, and many tests no model
    tokenizer: ChatTokenizer,
    family: Family,
    config: Mapping[str, Any],
    media: Sequence[VisionInput],
    question: str,
    *,
    options: Sequence[str] | None = None,
    kind: str = "qa",
    response_prefix: str = "",
    system: str = SYSTEM_PROMPT,
) -> Prompt:
    """Write a question about some media as a prompt.

    Args:
        tokenizer, family, config: the checkpoint's (`VideoModel` has all three).
        media: videos and images in the order of the prompt; may be empty.
        question, options, kind: see `question_text`.
        response_prefix: a beginning of the model's turn, read literally.
        system: the system prompt that the checkpoint was trained with (`VideoModel.system_prompt`).

    Raises:
        ConfigError: see `question_text`; or the prompt does not fit into the model's context.
        CheckpointError: the chat template or the tokenizer does not know the media's tokens.
    """
    text = question_text(question, options, kind)
    content = [*({"type": str(medium.kind)} for medium in media), {"type": "text", "text": text}]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system},
        {"role": "user", "content": content},
    ]
    rendered = tokenizer.render(messages)
    start = rendered.rfind(text)  # only the template's own, shorter text follows it
    if start < 0:
        raise CheckpointError("the chat template changes the question's text: use the checkpoint's own template")
    names = {kind: _token_text(tokenizer, config, kind) for kind in ("image", "video", "vision_start", "vision_end")}
    opening, blocks = _write_vision(rendered[:start], family, config, media, names)
    ids = tokenizer.encode(opening + rendered[start:], literal=(len(opening), len(opening) + len(text)))
    response_prefix_ids = tokenizer.encode(response_prefix, literal=(0, len(response_prefix)))
    ids += response_prefix_ids
    expanded, mask, prefix_length = _expand(ids, blocks, config)
    context = int(text_settings(config)["max_position_embeddings"])
    if len(expanded) >= context:
        raise ConfigError(
            f"the prompt has {len(expanded)} tokens, {int(mask.sum())} of them visual, and the model's context is "
            f"{context}: lower --video-tokens or --max-frames (video_tokens, max_frames), cut the clip with --start "
            "and --end (start, end), or shorten the question"
        )
    positions, next_position = family.positions(config, mask, blocks)
    return Prompt(expanded, positions, tuple(media), mask, prefix_length, next_position, tuple(response_prefix_ids))


def _lettered(options: Sequence[str] | None) -> str:
    """Options as lines 'A. ..', 'B. ..'."""
    if options is None or len(options) == 0:
        return ""
    if isinstance(options, str):
        raise ConfigError(f"options are one text, {options!r}: give a list of choices")
    if len(options) > len(ascii_uppercase):
        raise ConfigError(f"{len(options)} options are more than the alphabet has letters: give at most 26")
    for letter, option in zip(ascii_uppercase, options):
        if not isinstance(option, str):
            raise ConfigError(f"option {letter} is {option!r}, no text: give every choice as a text")
        if not option.strip():
            raise ConfigError(f"option {letter} is empty: give every choice a text")
    return "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, strip_letters(options)))


def _token_text(tokenizer: ChatTokenizer, config: Mapping[str, Any], kind: str) -> str:
    """The text of a vision token, by its id in `config.json`."""
    index = config[f"{kind}_token_id"]
    text = tokenizer.token(index)
    if text is None or text not in tokenizer.special_ids:
        raise CheckpointError(
            f"config.json gives {kind}_token_id {index}, which is no special token of tokenizer.json: the files do not "
            "belong together"
        )
    return text


def _write_vision(
    opening: str, family: Family, config: Mapping[str, Any], media: Sequence[VisionInput], names: Mapping[str, str]
) -> tuple[str, list[VisionBlock]]:
    """Replace each medium's placeholder in the template's text by its vision blocks, one pad token to a block."""
    start, end = names["vision_start"], names["vision_end"]
    placeholder = re.compile(
        f"{re.escape(start)}({re.escape(names['image'])}|{re.escape(names['video'])}){re.escape(end)}"
    )
    pads = [match.group(1) for match in placeholder.finditer(opening)]
    if pads != [names[medium.kind] for medium in media]:
        raise CheckpointError(
            f"the chat template writes {len(pads)} vision placeholders for {len(media)} media: use the checkpoint's "
            "own template"
        )
    layouts = [family.vision_layout(medium, config) for medium in media]
    following = iter(zip(layouts, pads))

    def write(_: re.Match[str]) -> str:
        layout, pad = next(following)
        return "".join(f"{block.label}{start}{pad}{end}" for block in layout)

    return placeholder.sub(write, opening), [block for layout in layouts for block in layout]


def _expand(
    ids: Sequence[int], blocks: Sequence[VisionBlock], config: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Repeat each pad token for all visual tokens of its block; return ids, mask, and the end of the last block."""
    once = np.asarray(ids, dtype=np.int32)
    is_pad = np.isin(once, (config["image_token_id"], config["video_token_id"]))
    repeats = np.ones(len(once), dtype=np.int64)
    repeats[is_pad] = [block.tokens for block in blocks]
    mask = np.repeat(is_pad, repeats)
    after_last = int(np.flatnonzero(mask)[-1]) + 2 if blocks else 0  # past the vision-end token
    return np.repeat(once, repeats), mask, after_last
