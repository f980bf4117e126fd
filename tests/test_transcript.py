r"""The protocol's parser: tables worked by hand, every cut through the tokens, and the real Qwen tokenizer.

Most rows are a whole output and what an honest reader would say of it. The fuzz checks that reading token by token,
cut anywhere, tells the same as reading the whole, and that the first box is closed at the very token that closes it;
the truth there is `first_box_by_hand`, a dozen lines that look at a whole text only.
"""

import random

import pytest
from qwen_tokenizer import qwen
from scripted_tokenizers import BytePieces, byte_fallback, cut, padding, skipping, stripping

from mlxvr.answering.transcript import FALLBACK, DualAnswerParser, Transcript, is_fallback, parse

WHOLE = "\\boxed{A}<think>it moves</think>\\boxed{B}"

# text, first, reasoning, second, problems
OUTPUTS = [
    # as it should be
    (WHOLE, "A", "it moves", "B", ()),
    ("\\boxed{A}\n<think>\nit moves\n</think>\n\n\\boxed{B}\n", "A", "it moves", "B", ()),
    (" \\boxed{ A }<think>r</think>\\boxed{\nB\n}", "A", "r", "B", ()),
    (WHOLE + "<|im_end|>", "A", "it moves", "B", ()),
    (WHOLE + "<|im_end|>\n<|endoftext|>", "A", "it moves", "B", ()),
    ("\\boxed{" + FALLBACK + "}<think>r</think>\\boxed{B}", FALLBACK, "r", "B", ()),
    ("\\boxed{A}<think>if \\boxed{C}, then {</think>\\boxed{B}", "A", "if \\boxed{C}, then {", "B", ()),
    ("\\boxed{A}<think>1 < 2 </ thinking></think>\\boxed{B}", "A", "1 < 2 </ thinking>", "B", ()),
    # braces
    ("\\boxed{\\frac{1}{2}}<think>r</think>\\boxed{2}", "\\frac{1}{2}", "r", "2", ()),
    (
        "\\boxed{\\sqrt{\\frac{\\sqrt{\\frac{1}{2}}}{3}}}<think>r</think>\\boxed{{{}}}",
        "\\sqrt{\\frac{\\sqrt{\\frac{1}{2}}}{3}}",
        "r",
        "{{}}",
        (),
    ),
    ("\\boxed{\\{1, 2\\}}<think>r</think>\\boxed{2}", "\\{1, 2\\}", "r", "2", ()),
    ("\\boxed{\\boxed{A}}<think>r</think>\\boxed{B}", "\\boxed{A}", "r", "B", ()),
    ("\\boxed{\\{1}<think>r</think>\\boxed{2}", None, "r", "2", ("unterminated_box",)),
    ("{\\boxed{A}}<think>r</think>\\boxed{B}", "A", "r", "B", ("extra_text",)),
    # it stops early
    ("", None, None, None, ("no_box", "no_think")),
    ("<|im_end|>", None, None, None, ("no_box", "no_think")),
    ("It is red.", None, None, None, ("no_box", "no_think", "extra_text")),
    ("\\boxed", None, None, None, ("no_box", "no_think")),
    ("\\boxed{", None, None, None, ("unterminated_box", "no_think")),
    ("\\boxed{A", None, None, None, ("unterminated_box", "no_think")),
    ("\\boxed{A {b}", None, None, None, ("unterminated_box", "no_think")),
    ("\\boxed{A<|im_end|>", None, None, None, ("unterminated_box", "no_think")),
    ("\\boxed{A}", "A", None, None, ("no_think", "no_second_box")),
    ("\\boxed{A}<", "A", None, None, ("no_think", "no_second_box")),
    ("\\boxed{A}\n<think", "A", None, None, ("no_think", "no_second_box")),
    ("\\boxed{A}<|im_end|>", "A", None, None, ("no_think", "no_second_box")),
    ("\\boxed{A}<think>", "A", "", None, ("unterminated_think", "empty_think", "no_second_box")),
    ("\\boxed{A}<think>so", "A", "so", None, ("unterminated_think", "no_second_box")),
    ("\\boxed{A}<think>so</th", "A", "so</th", None, ("unterminated_think", "no_second_box")),
    ("\\boxed{A}<think>so<|im_end|>", "A", "so", None, ("unterminated_think", "no_second_box")),
    ("\\boxed{A}<think>so</think>", "A", "so", None, ("no_second_box",)),
    ("\\boxed{A}<think>so</think>It is B.", "A", "so", None, ("no_second_box", "extra_text")),
    ("\\boxed{A}<think>so</think>\\boxed{B", "A", "so", None, ("unterminated_box",)),
    # parts are empty
    ("\\boxed{}<think>r</think>\\boxed{B}", "", "r", "B", ("empty_box",)),
    ("\\boxed{ }<think>r</think>\\boxed{B}", "", "r", "B", ("empty_box",)),
    ("\\boxed{A}<think>r</think>\\boxed{}", "A", "r", "", ("empty_box",)),
    ("\\boxed{A}<think> \n</think>\\boxed{B}", "A", "", "B", ("empty_think",)),
    # text where none belongs
    ("The answer is " + WHOLE, "A", "it moves", "B", ("extra_text",)),
    (WHOLE + " Done.", "A", "it moves", "B", ("extra_text",)),
    ("\\boxed{A}.<think>r</think>\\boxed{B}", "A", "r", "B", ("extra_text",)),
    ("\\boxed{A}<<think>r<", "A", "r<", None, ("unterminated_think", "no_second_box", "extra_text")),
    ("\\boxed{A}<think>r</think>so \\boxed{B}", "A", "r", "B", ("extra_text",)),
    # it reasons first
    ("<think>r</think>\\boxed{B}", None, "r", "B", ("no_first_box",)),
    ("<think>r \\boxed{A}</think>\\boxed{B}", None, "r \\boxed{A}", "B", ("no_first_box",)),
    ("<think>r</think>", None, "r", None, ("no_box",)),
    ("<think>r</think>It is B.", None, "r", None, ("no_box", "extra_text")),
    ("<think>r", None, "r", None, ("no_box", "unterminated_think")),
    ("r</think>\\boxed{B}", None, "r", "B", ("no_first_box", "no_think")),
    # tags are missing or too many
    ("\\boxed{A}<think>r \\boxed{B}", "A", "r", "B", ("unterminated_think",)),
    ("\\boxed{A}<think>r \\boxed{C} or \\boxed{B}\n<|im_end|>", "A", "r \\boxed{C} or", "B", ("unterminated_think",)),
    ("\\boxed{A}<think>r \\boxed{B} so", "A", "r \\boxed{B} so", None, ("unterminated_think", "no_second_box")),
    ("<think>r \\boxed{B}", None, "r", "B", ("no_first_box", "unterminated_think")),
    ("\\boxed{A}it moves</think>\\boxed{B}", "A", "it moves", "B", ("no_think",)),
    ("\\boxed{A}\\boxed{B}", "A", None, "B", ("no_think",)),
    ("\\boxed{A} it moves \\boxed{B}", "A", None, "B", ("no_think", "extra_text")),
    ("\\boxed{A}\\boxed{B}\\boxed{C}", "A", None, "C", ("repeated_box", "no_think")),
    ("\\boxed{A}\\boxed{B", "A", None, None, ("unterminated_box", "no_think")),
    ("\\boxed{A <think>r</think>\\boxed{B}", None, "r", "B", ("unterminated_box",)),
    ("\\boxed{A <think>r</think>}", None, "r", None, ("unterminated_box", "no_second_box", "extra_text")),
    ("\\boxed{A}\\boxed{C}<think>r</think>\\boxed{B}", "A", "r", "B", ("repeated_box",)),
    (WHOLE + "\\boxed{C}", "A", "it moves", "C", ("repeated_box",)),
    (WHOLE + "\\boxed{", "A", "it moves", "B", ("unterminated_box",)),
    ("\\boxed{A}<think>a<think>b</think>\\boxed{B}", "A", "a<think>b", "B", ("repeated_think",)),
    (
        WHOLE + "<think>no</think>\\boxed{C}",
        "A",
        "it moves</think>\\boxed{B}<think>no",
        "C",
        ("repeated_think",),
    ),
    (WHOLE + "</think>", "A", "it moves</think>\\boxed{B}", None, ("repeated_think", "no_second_box")),
    (WHOLE + "<think>no", "A", "it moves", "B", ("unterminated_think", "repeated_think")),
    ("\\boxed{A}<think>a</think>b</think>\\boxed{B}", "A", "a</think>b", "B", ("repeated_think",)),
]


@pytest.mark.parametrize(("text", "first", "reasoning", "second", "problems"), OUTPUTS)
def test_outputs(text, first, reasoning, second, problems):
    got = parse(text)
    assert (got.first, got.reasoning, got.second) == (first, reasoning, second)
    assert got.problems == problems


@pytest.mark.parametrize(
    ("text", "span", "second_span"),
    [
        (WHOLE, (7, 8), (39, 40)),
        ("so \\boxed{ A }<think>r</think>", (10, 13), None),
        ("<think>r</think>\\boxed{B}", None, (23, 24)),
        ("\\boxed{}", (7, 7), None),
        ("\\boxed{A", None, None),
    ],
)
def test_spans_hold_the_content_as_it_was_written(text, span, second_span):
    got = parse(text)
    assert (got.first_span, got.second_span) == (span, second_span)


@pytest.mark.parametrize(
    ("text", "outside"),
    [
        ("It is red.", "It is red."),
        ("It is <think>r</think> red.", "It is  red."),
        ("<think>r", ""),
        ("\\boxed{B", "B"),
        ("so \\boxed{B <think>r</think>!", "so B !"),
        (WHOLE, ""),
        ("It is red.<|im_end|>", "It is red."),
    ],
)
def test_what_stands_outside(text, outside):
    assert parse(text).outside == outside


def test_the_end_of_turn_is_no_text():
    assert parse(WHOLE + "\n<|im_end|>").text == WHOLE + "\n"
    assert parse("a<|im_end|>b").text == "a<|im_end|>b"


def test_a_box_at_the_token_limit_is_a_note():
    text = "\\boxed{A}<think>maybe \\boxed{C}"
    got = parse(text, hit_limit=True)
    assert (got.first, got.reasoning, got.second) == ("A", "maybe \\boxed{C}", None)
    assert got.problems == ("unterminated_think", "no_second_box", "token_limit")


@pytest.mark.parametrize(
    ("content", "declines"),
    [
        (FALLBACK, True),
        ("Let's analyze", True),
        ("  \nLet's analyze the video.", True),
        ("Let’s analyze the problem step by step.", True),
        ("Letʼs analyze", True),
        ("let's  analyze", True),
        ("\\text{Let's analyze the problem step by step.}", True),
        ("\\textbf{ Let’s analyze}", True),
        ("Let's go", False),
        ("He said: Let's analyze", False),
        ("Lets analyze", False),
        ("Let", False),
        ("B", False),
        ("", False),
    ],
)
def test_fallback(content, declines):
    assert is_fallback(content) is declines
    assert parse(f"\\boxed{{{content}}}").is_fallback is declines


def test_no_box_is_no_fallback():
    assert not parse(FALLBACK).is_fallback


# The pieces that Qwen's tokenizer makes: at which token (counted from 1) is the first box closed, and what is read?
@pytest.mark.parametrize(
    ("flavour", "text", "closing_token", "read", "first"),
    [
        ("qwen2.5", "\\boxed{A}<think>", 5, "\\boxed{A}<", "A"),
        ("qwen3", "\\boxed{A}<think>", 5, "\\boxed{A}", "A"),
        ("qwen2.5", "\\boxed{A}\n<think>", 5, "\\boxed{A}\n", "A"),
        ("qwen3", "\\boxed{A}\n<think>", 5, "\\boxed{A}\n", "A"),
        ("qwen2.5", "\\boxed{(B)}<think>", 5, "\\boxed{(B)}", "(B)"),
        ("qwen2.5", "\\boxed{}<think>", 3, "\\boxed{}", ""),
        ("qwen3", "\\boxed{\\frac{1}{2}}<think>", 9, "\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("qwen3", "\\boxed{[20.3, 30.8]}<think>", 15, "\\boxed{[20.3, 30.8]}", "[20.3, 30.8]"),
        ("qwen3", "\\boxed{𓀀}<think>", 7, "\\boxed{𓀀}", "𓀀"),
        ("qwen2.5", "\\boxed{龘}<think>", 6, "\\boxed{龘}<", "龘"),
    ],
)
def test_the_first_box_closes_at_its_token(flavour, text, closing_token, read, first):
    tokenizer = qwen(flavour)
    ids = tokenizer.encode(text + "it moves</think>\\boxed{C}")
    parser = DualAnswerParser(tokenizer.decode)
    for token in ids[: closing_token - 1]:
        parser.push(token)
        assert not parser.first_closed
        assert parser.first is parser.first_span is None
        assert parser.stage in ("start", "first_box")
    parser.push(ids[closing_token - 1])
    assert parser.first_closed
    assert parser.stage == "after_first"
    assert (parser.text, parser.first) == (read, first)
    for token in ids[closing_token:]:  # and it goes on with the same parser
        parser.push(token)
    got = parser.finish()
    assert (got.first, got.reasoning, got.second, got.problems) == (
        first,
        "it moves",
        "C",
        ("empty_box",) * (not first),
    )


def test_an_exit_at_the_closing_brace_is_no_departure_but_for_what_it_leaves_out():
    tokenizer = qwen("qwen2.5")
    parser = DualAnswerParser(tokenizer.decode)
    for token in tokenizer.encode("\\boxed{A}<think>")[:5]:
        parser.push(token)
    assert parser.finish() == Transcript(
        text="\\boxed{A}<", first="A", first_span=(7, 8), outside="<", problems=("no_think", "no_second_box")
    )


def test_stages():
    tokenizer = BytePieces(
        [b"so ", b"\\boxed{", b"A", b"}", b"<think>", b"r", b"</think>", b"\\boxed{", b"B", b"}", b"!"]
    )
    parser = DualAnswerParser(tokenizer.decode)
    seen = []
    for token in tokenizer.ids:
        parser.push(token)
        seen.append((parser.stage, parser.first, parser.reasoning, parser.second))
    assert seen == [
        ("start", None, None, None),
        ("first_box", None, None, None),
        ("first_box", None, None, None),
        ("after_first", "A", None, None),
        ("reasoning", "A", "", None),
        ("reasoning", "A", "r", None),
        ("after_reasoning", "A", "r", None),
        ("second_box", "A", "r", None),
        ("second_box", "A", "r", None),
        ("done", "A", "r", "B"),
        ("done", "A", "r", "B"),
    ]


def test_reasoning_comes_in_pieces_without_its_tags():
    pieces = ["\\boxed{A}<think>", "\n ", "a <", " b", "</", "i> ", "\n", "c", " ", "</th", "ink>", "\\boxed{B}"]
    tokenizer = BytePieces([piece.encode() for piece in pieces])
    parser = DualAnswerParser(tokenizer.decode)
    taken = []
    for token in tokenizer.ids:
        parser.push(token)
        taken.append(parser.take_reasoning())
    assert taken == ["", "", "a", " < b", "", "</i>", "", " \nc", "", "", "", ""]
    assert "".join(taken) == parser.finish().reasoning == "a < b</i> \nc"
    assert parser.take_reasoning() == ""


def test_reasoning_that_is_cut_off_is_taken_to_its_end():
    tokenizer = BytePieces([b"\\boxed{A}<think>", b"a </th"])
    parser = DualAnswerParser(tokenizer.decode)
    parser.push(0)
    parser.push(1)
    assert parser.take_reasoning() == "a"
    parser.finish(hit_limit=True)
    assert parser.take_reasoning() == " </th"
    assert parser.take_reasoning() == ""


FRAGMENTS = [
    *["\\boxed{", "<think>", "</think>", "}", "A", "r"] * 3,
    *["{", "\\", "boxed", "<", "/think>", "</", "think", ">", "\\{", "\\}", "\\frac{1}{2}", "\\boxed{B}", " ", "\n"],
    *["左", "é", "🏀", "\ufffd", "<|im_end|>", FALLBACK],
]


def first_box_by_hand(text):
    """Content and end of the first box before any tag, looking at a whole text; None if there is none."""
    limit = min((at for at in (text.find("<think>"), text.find("</think>")) if at >= 0), default=len(text))
    begin = text.find("\\boxed{", 0, limit)
    if begin < 0:
        return None
    depth = 0
    for at in range(begin, limit):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if text[at] == "}" and depth == 0:
            return text[begin + len("\\boxed{") : at].strip(), at + 1
    return None


def check(ids, decode):
    """Read token by token, and compare with what the whole text tells."""
    whole = decode(ids)
    parser = DualAnswerParser(decode)
    text = reasoning = ""
    closed_at = None
    for number, token in enumerate(ids):
        text += parser.push(token)
        assert parser.text == text
        if parser.first_closed and closed_at is None:
            closed_at = number
            assert parser.first == first_box_by_hand(whole)[0]
        reasoning += parser.take_reasoning()
    got = parser.finish()
    reasoning += parser.take_reasoning()
    assert parser.text == whole
    assert got == parse(whole)
    by_hand = first_box_by_hand(whole)
    assert got.first == (by_hand and by_hand[0])
    assert (closed_at is None) == (by_hand is None)
    if closed_at is not None:  # not one token before
        before = first_box_by_hand(decode(ids[:closed_at]))
        assert before is None
        assert parser.token_spans[closed_at][0] < by_hand[1] <= parser.token_spans[closed_at][1]
    assert reasoning.startswith(got.reasoning or "")
    if "unterminated_think" not in got.problems:
        assert reasoning == (got.reasoning or "")


def random_output(chance):
    return "".join(chance.choices(FRAGMENTS, k=chance.randint(1, 14)))


def test_any_cut_tells_the_same():
    chance = random.Random(0)
    for _ in range(8000):
        tokenizer = BytePieces(cut(random_output(chance).encode(), chance, chance.choice([1, 2, 4, 9])))
        check(tokenizer.ids, tokenizer.decode)


@pytest.mark.parametrize("wrap", [stripping, padding, lambda decode: skipping(decode, {1, 4})])
def test_any_cut_with_decoders_that_change_spaces_or_skip_tokens(wrap):
    chance = random.Random(1)
    for _ in range(2000):
        tokenizer = BytePieces(cut(random_output(chance).encode(), chance, 5))
        check(tokenizer.ids, wrap(tokenizer.decode))


def test_any_cut_with_bytes_that_are_no_text():
    chance = random.Random(2)
    for _ in range(3000):
        data = bytearray(random_output(chance).encode())
        for _ in range(3):
            data.insert(chance.randint(0, len(data)), chance.choice([0xE4, 0xBD, 0xF0, 0x9F, 0xFF]))
        tokenizer = BytePieces(cut(bytes(data), chance, 4))
        check(tokenizer.ids, tokenizer.decode)


def test_any_output_through_a_byte_fallback_decoder():
    chance = random.Random(3)
    known = {character for character in "".join(FRAGMENTS) if character.isascii()}
    for _ in range(500):
        text = random_output(chance).replace("\ufffd", "")  # which this decoder also writes for each pending byte
        check(*byte_fallback(text, known))


@pytest.mark.parametrize("flavour", ["qwen2.5", "qwen3"])
def test_any_output_through_the_real_tokenizer(flavour):
    tokenizer = qwen(flavour)
    chance = random.Random(4)
    for _ in range(1500):
        check(tokenizer.encode(random_output(chance)), tokenizer.decode)


@pytest.mark.parametrize("flavour", ["qwen2.5", "qwen3"])
def test_any_tokens_at_all(flavour):
    tokenizer = qwen(flavour)
    known = [tokenizer.encode(fragment)[0] for fragment in FRAGMENTS]
    chance = random.Random(5)
    for _ in range(1500):
        check(
            [chance.choice(known) if chance.random() < 0.7 else chance.randrange(151_643) for _ in range(12)],
            tokenizer.decode,
        )


def test_the_table_of_outputs_token_by_token():
    chance = random.Random(6)
    for text, *_ in OUTPUTS:
        for longest in (1, 2, 3, 5, 8):
            tokenizer = BytePieces(cut(text.encode(), chance, longest))
            check(tokenizer.ids, tokenizer.decode)


def test_the_cost_is_linear():
    costs = []
    for count in (1000, 4000):
        tokenizer = BytePieces([b"\\boxed{A}<think>", *[b"word "] * count])
        parser = DualAnswerParser(tokenizer.decode)
        for token in tokenizer.ids:
            parser.push(token)
            parser.take_reasoning()
        parser.finish()
        costs.append(tokenizer.decoded_ids)
    assert costs[1] < 4.2 * costs[0]
