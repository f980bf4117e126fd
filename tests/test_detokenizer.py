"""Text from tokens, piece by piece: the pieces add up to one decoding of everything, whatever the tokens cut.

The truth is the tokenizer's own decoding of all tokens at once; the spans below are worked by hand.
"""

import random

import pytest
from qwen_tokenizer import qwen
from scripted_tokenizers import BytePieces, byte_fallback, cut, padding, skipping, stripping

from mlxvr.answering.detokenizer import Detokenizer

TEXTS = [
    "plain words, and  two spaces ",
    "naïve café — “quotes” …",
    "左边的杯子在中间。",
    "الكرة تحت الكوب الأيسر",
    "🏀🇨🇭👩‍👩‍👧 𓀀 龘",
    "a\ufffdb\ufffd\ufffd\ufffd\ufffdc",
    "\n\n\t \n",
    "",
]


def read(ids, decode):
    """Everything that comes out, and the pieces it came in."""
    reader = Detokenizer(decode)
    pieces = [reader.push(token) for token in ids]
    pieces.append(reader.flush())
    return "".join(pieces), pieces, reader


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("flavour", ["qwen2.5", "qwen3"])
def test_the_real_tokenizer(text, flavour):
    tokenizer = qwen(flavour)
    assert read(tokenizer.encode(text), tokenizer.decode)[0] == text


@pytest.mark.parametrize("wrap", [None, stripping, padding, lambda decode: lambda ids: decode(ids).lstrip()])
def test_any_cut_through_the_bytes(wrap):
    chance = random.Random(0)
    for _ in range(2000):
        data = "".join([*chance.choices(TEXTS, k=3), "."]).encode()
        tokenizer = BytePieces(cut(data, chance, chance.choice([1, 2, 3, 8])))
        decode = wrap(tokenizer.decode) if wrap else tokenizer.decode
        assert read(tokenizer.ids, decode)[0] == decode(tokenizer.ids)


def test_bytes_that_are_no_text():
    chance = random.Random(1)
    for _ in range(2000):
        data = bytes(chance.choices([0x20, 0x41, 0x7D, 0x80, 0xBF, 0xC3, 0xA9, 0xE4, 0xBD, 0xF0, 0x9F, 0xFF], k=40))
        tokenizer = BytePieces(cut(data, chance, 3))
        assert read(tokenizer.ids, tokenizer.decode)[0] == tokenizer.decode(tokenizer.ids)


def test_byte_fallback():
    chance = random.Random(2)
    for _ in range(500):
        text = "".join(chance.choices("ab 你好🏀é{}", k=20))
        ids, decode = byte_fallback(text, set("ab {}"))
        assert read(ids, decode)[0] == decode(ids) == text.removeprefix(" ")


def test_special_tokens_that_are_skipped():
    tokenizer = BytePieces([b"a", b"<special>", b" b", b"<special>", b"<special>", b" c"])
    decode = stripping(skipping(tokenizer.decode, {1, 3, 4}))
    text, _, reader = read(tokenizer.ids, decode)
    assert text == "a b c"
    assert reader.spans == [(0, 1), (1, 1), (1, 3), (3, 3), (3, 3), (3, 5)]


def test_half_a_character_is_held_back_and_nothing_else():
    _, pieces, _ = read([0, 1, 2, 3], BytePieces([b"ab\xe4", b"\xbd", b"\xa0c", b"d"]).decode)
    assert pieces == ["ab", "", "你c", "d", ""]


def test_a_real_replacement_character_does_not_stall():
    _, pieces, _ = read([0, 1, 2, 3], BytePieces(["\ufffd".encode(), b"a", b"\xff", b"}"]).decode)
    assert pieces == ["", "\ufffda", "", "\ufffd}", ""]
    _, pieces, _ = read([0, 1], BytePieces([b"a", "\ufffd".encode()]).decode)
    assert pieces == ["a", "", "\ufffd"], "at the end it is handed out by flush"


def test_endless_replacement_characters_do_not_stall():
    tokenizer = BytePieces(["\ufffd".encode()] * 3000)
    reader = Detokenizer(tokenizer.decode)
    got = "".join(reader.push(token) for token in tokenizer.ids)
    assert 3000 - len(got) <= 3
    assert got + reader.flush() == "\ufffd" * 3000


@pytest.mark.parametrize(
    ("pieces", "spans"),
    [
        ([b"ab", b"c"], [(0, 2), (2, 3)]),
        ([b"\xe4", b"\xbd", b"\xa0", b"x"], [(0, 1), (0, 1), (0, 1), (1, 2)]),
        ([b"a\xe4", b"\xbd\xa0b"], [(0, 2), (1, 3)]),
        ([b"\xf0\x9f", b"\x8f\x80}", b"c"], [(0, 1), (0, 2), (2, 3)]),
        (["\ufffd".encode(), b"\xe4", b"\xbd\xa0"], [(0, 1), (1, 2), (1, 2)]),
        ([b"\xff", b"a"], [(0, 1), (1, 2)]),
        ([b"\xef", b"\xbf", b"\xbd", b"a"], [(0, 1), (0, 1), (0, 1), (1, 2)]),
    ],
)
def test_a_token_covers_every_character_that_it_has_a_part_of(pieces, spans):
    assert read(list(range(len(pieces))), BytePieces(pieces).decode)[2].spans == spans


def test_bytes_that_fell_back_share_their_character():
    ids, decode = byte_fallback("a你好b", set("ab"))
    assert read(ids, decode)[2].spans == [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (3, 4)]


def test_spans_are_those_of_the_whole_text():
    chance = random.Random(3)
    for _ in range(300):
        text = "".join(chance.choices(TEXTS[:5], k=6))
        starts = [0]  # of the characters, in bytes
        for character in text:
            starts.append(starts[-1] + len(character.encode()))
        tokenizer = BytePieces(cut(text.encode(), chance, 6))
        spans, at = read(tokenizer.ids, tokenizer.decode)[2].spans, 0
        for piece, span in zip(tokenizer.pieces, spans, strict=True):
            covered = [k for k in range(len(text)) if starts[k] < at + len(piece) and starts[k + 1] > at]
            assert span == (covered[0], covered[-1] + 1)
            at += len(piece)


@pytest.mark.parametrize(
    ("pieces", "most"),
    [
        ([b"word "], 12),
        ([b"\n"], 12),
        (["\ufffd".encode()], 60),
        ([b"\xff"], 60),
        ([b"\xf0"], 60),
        ([b"\xef", b"\xbf", b"\xbd"], 60),
        ([b""], 60),
    ],
)
def test_the_cost_is_linear(pieces, most):
    tokenizer = BytePieces([b"\xff", *pieces * (4000 // len(pieces))])
    text, _, _ = read(tokenizer.ids, tokenizer.decode)
    assert tokenizer.decoded_ids < most * 4000
    assert text == tokenizer.decode(tokenizer.ids)
