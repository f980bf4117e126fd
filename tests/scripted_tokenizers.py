"""Small tokenizers that behave at decode time as real ones do, for tests that need every way to cut a text.

A tokenizer here is a list of pieces of bytes; a token id is an index into it. Cutting at random bytes makes tokens
that no trained tokenizer would have, and that a model may still write: half a character and a brace, for example.
"""

import random
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models

__all__ = ["BytePieces", "byte_fallback", "cut", "padding", "skipping", "stripping"]


class BytePieces:
    """Decodes as byte-level BPE does: all bytes together, U+FFFD for what is no character."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.decoded_ids = 0  # what decoding has cost

    @property
    def ids(self) -> list[int]:
        """One token for each piece."""
        return list(range(len(self.pieces)))

    def decode(self, ids: list[int]) -> str:
        self.decoded_ids += len(ids)
        return b"".join(self.pieces[token] for token in ids).decode("utf-8", errors="replace")


def cut(data: bytes, chance: random.Random, longest: int) -> list[bytes]:
    """Cut bytes into pieces of 1 to `longest` bytes, anywhere."""
    pieces = []
    while data:
        size = chance.randint(1, longest)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def stripping(decode: Callable[[list[int]], str]) -> Callable[[list[int]], str]:
    """As SentencePiece: every decode loses one leading space."""
    return lambda ids: decode(ids).removeprefix(" ")


def padding(decode: Callable[[list[int]], str]) -> Callable[[list[int]], str]:
    """Every decode gains a leading space."""
    return lambda ids: " " + decode(ids)


def skipping(decode: Callable[[list[int]], str], special: set[int]) -> Callable[[list[int]], str]:
    """Special tokens decode to nothing, as with `skip_special_tokens=True`."""
    return lambda ids: decode([token for token in ids if token not in special])


def byte_fallback(text: str, known: set[str]) -> tuple[list[int], Callable[[list[int]], str]]:
    """Llama's decoder, the real one: a token a character, unknown ones byte by byte, a leading space stripped.

    While a character is incomplete this decoder writes one U+FFFD for each of its bytes, and one for each byte of the
    characters before it that also fell back.
    """
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for number, character in enumerate(sorted(known)):
        vocabulary["▁" if character == " " else character] = 256 + number
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ids: list[int] = []
    for character in text:
        whole = vocabulary.get("▁" if character == " " else character)
        ids += [whole] if whole is not None else list(character.encode())
    return ids, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
