"""Prompts: the words that VideoAuto-R1 was trained with, and their tokens, positions and places for pictures.

A prompt is the system prompt, then the media, then the question, wrapped by the checkpoint's chat template. Since the
media come before the question, every question about the same media shares a prefix, up to the last vision block.

The question is the user's text and is read literally: special tokens spelt in it stay plain text (see `tokenizer`).
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
        media: what the visual tokens stand for, in order.
        media_mask: bool (n,), True for visual tokens.
        prefix_length: tokens up to the end of the last vision block: the same for every question about these media.
        next_position: of the first token that is generated.
        response_prefix_ids: the last of `ids`, with which the answer is begun for the model; empty: it begins itself.
    """

    ids: np.ndarray
    positions: np.ndarray
    media: tuple[VisionInput, ...]
    media_mask: np.ndarray
    prefix_length: int
    next_position: int
    response_prefix_ids: tuple[int, ...] = ()


def evaluation_copy(system: str) -> str:
    """A system prompt as the public evaluator has it: VideoAuto-R1's with one more newline at its end, others as is."""
    return f"{system}\n" if system == SYSTEM_PROMPT else system


def question_text(question: str, options: Sequence[str] | None = None, kind: str = "qa") -> str:
    """The user's text of a prompt, in the words of the public training data.

    Args:
        question: the question, or for "grounding" the description of the segment to find.
        options: up to 26 choices; where each carries its letter already (`A. red`, `B. blue`), that is taken off.
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


def build_prompt(
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
        media: videos and images in the order in which they are shown; may be empty.
        question, options, kind: see `question_text`.
        response_prefix: text that the model's turn is begun with, read literally.
        system: what the checkpoint was trained to be told first (`VideoModel.system_prompt`).

    Raises:
        ConfigError: see `question_text`; or the prompt does not fit into the model's context.
        CheckpointError: the chat template or the tokenizer does not know the media's tokens.
    """
    text = question_text(question, options, kind)
    content = [*({"type": str(one.kind)} for one in media), {"type": "text", "text": text}]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system},
        {"role": "user", "content": content},
    ]
    rendered = tokenizer.render(messages)
    start = rendered.rfind(text)  # what follows it is the template's own and shorter
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
            f"{context}: lower video_tokens or max_frames, cut the clip with start and end, or shorten the question"
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
        raise ConfigError(f"{len(options)} options are more than there are letters: give at most 26")
    for letter, option in zip(ascii_uppercase, options):
        if not isinstance(option, str):
            raise ConfigError(f"option {letter} is {option!r}, no text: give every choice as a text")
        if not option.strip():
            raise ConfigError(f"option {letter} is empty: give every choice a text")
    return "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, strip_letters(options)))


def _token_text(tokenizer: ChatTokenizer, config: Mapping[str, Any], kind: str) -> str:
    """How a vision token is spelt, by the id that `config.json` gives it."""
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
    found = [match.group(1) for match in placeholder.finditer(opening)]
    if found != [names[one.kind] for one in media]:
        raise CheckpointError(
            f"the chat template writes {len(found)} vision placeholders for {len(media)} media: use the checkpoint's "
            "own template"
        )
    layouts = [family.vision_layout(one, config) for one in media]
    following = iter(zip(layouts, found))

    def write(_: re.Match[str]) -> str:
        layout, pad = next(following)
        return "".join(f"{block.label}{start}{pad}{end}" for block in layout)

    return placeholder.sub(write, opening), [block for layout in layouts for block in layout]


def _expand(
    ids: Sequence[int], blocks: Sequence[VisionBlock], config: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Repeat each pad token as often as its block has visual tokens: ids, mask, and where the last block ends."""
    once = np.asarray(ids, dtype=np.int32)
    is_pad = np.isin(once, (config["image_token_id"], config["video_token_id"]))
    repeats = np.ones(len(once), dtype=np.int64)
    repeats[is_pad] = [block.tokens for block in blocks]
    mask = np.repeat(is_pad, repeats)
    after_last = int(np.flatnonzero(mask)[-1]) + 2 if blocks else 0  # past the vision-end token
    return np.repeat(once, repeats), mask, after_last
