"""The real Qwen tokenizer, offline: `dashscope` carries its 151,643 merge ranks, `tiktoken` runs them.

Two flavours: Qwen3 has `<think>` and `</think>` as single tokens (not special ones: they decode to themselves), in
Qwen2.5 they are spelled. The package `dashscope` itself is never imported, which would be slow: only its file is read.
The splitting pattern is the one of `tokenizer.json` in the public Qwen checkpoints.
"""

import base64
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

__all__ = ["END_OF_TURN", "Qwen", "qwen"]

END_OF_TURN = 151645

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIALS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": END_OF_TURN,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
_THINK = {"<think>": 151667, "</think>": 151668}


@dataclass(frozen=True)
class Qwen:
    """Encodes and decodes as a checkpoint of that flavour does."""

    encoding: object

    def encode(self, text: str) -> list[int]:
        """Text to ids, special tokens included."""
        return self.encoding.encode(text, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        """Ids to text, with U+FFFD for bytes that are no character (yet)."""
        return self.encoding.decode(ids)

    def pieces(self, text: str) -> list[str]:
        """The tokens of a text, each decoded alone."""
        return [self.decode([token]) for token in self.encode(text)]


@cache
def qwen(flavour: str) -> Qwen:
    """The tokenizer of `flavour` ("qwen2.5" or "qwen3"); skips the test where it is not installed."""
    tiktoken = pytest.importorskip("tiktoken")
    spec = find_spec("dashscope")
    if spec is None or spec.origin is None:
        pytest.skip("the Qwen tokenizer comes with dashscope<2 (extra `test`)")
    lines = (Path(spec.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    assert len(ranks) == 151_643
    specials = {**_SPECIALS, **(_THINK if flavour == "qwen3" else {})}
    return Qwen(tiktoken.Encoding(flavour, pat_str=_SPLIT, mergeable_ranks=ranks, special_tokens=specials))
