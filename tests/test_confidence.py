r"""The first answer's tokens and confidence, worked by hand on the tokens of the real Qwen tokenizer.

A row spells the box as its tokens. Those that belong to the answer are pairs (token, probability); every other token
is given probability 0.001, which would ruin the mean if it were counted. Means are geometric: (0.81, 0.49) has 0.63,
(0.8, 0.4, 0.2) and (0.8, 0.2) have 0.4.
"""

import math

import pytest
from qwen_tokenizer import END_OF_TURN, qwen
from scripted_tokenizers import BytePieces, byte_fallback, skipping, stripping

from mlxvr.answering.confidence import ScoredAnswer, answer_span, score_first_answer, should_exit

OPEN = ["\\", "boxed", "{"]
BROKEN = "\ufffd"  # a token that is a part of a character

# tokens of the box, text of the answer, tokens [start, end), confidence
BOXES = {
    "letter": ([*OPEN, ("A", 0.9), "}"], "A", (3, 4), 0.9),
    "word that is a letter": ([*OPEN, ("I", 0.9), "}"], "I", (3, 4), 0.9),
    "spaced letter": ([*OPEN, (" A", 0.9), " }"], "A", (3, 4), 0.9),
    "letter on its own line": (["\\", "boxed", "{\n", ("B", 0.75), "\n", "}"], "B", (3, 4), 0.75),
    "parenthesised": (["\\", "boxed", "{(", ("B", 0.9), ")}"], "B", (3, 4), 0.9),
    "parenthesised, lower case": (["\\", "boxed", "{(", ("b", 0.9), ")}"], "b", (3, 4), 0.9),
    "parenthesised and text": ([*OPEN, " (", ("C", 0.6), ")", " a", " cat", " }"], "C", (4, 5), 0.6),
    "letter.": ([*OPEN, ("B", 0.9), ".", "}"], "B", (3, 4), 0.9),
    "letter. text": ([*OPEN, ("B", 0.9), ".", " The", " dog", "}"], "B", (3, 4), 0.9),
    "letter) text": ([*OPEN, ("C", 0.9), ")", " two", " dogs", "}"], "C", (3, 4), 0.9),
    "letter: text": ([*OPEN, ("D", 0.9), ":", " red", "}"], "D", (3, 4), 0.9),
    "letter - text": ([*OPEN, ("B", 0.9), " -", " left", "}"], "B", (3, 4), 0.9),
    "letter and word": ([*OPEN, ("A", 0.81), (" dog", 0.49), "}"], "A dog", (3, 5), 0.63),
    "word": ([*OPEN, ("Before", 0.9), "}"], "Before", (3, 4), 0.9),
    "words": ([*OPEN, ("the", 0.8), (" red", 0.4), (" cup", 0.2), "}"], "the red cup", (3, 6), 0.4),
    "yes": ([*OPEN, ("yes", 0.99), "}"], "yes", (3, 4), 0.99),
    "number": ([*OPEN, ("4", 0.81), ("2", 0.49), "}"], "42", (3, 5), 0.63),
    "negative number": (
        ["\\", "boxed", ("{-", 0.8), ("3", 0.2), (".", 0.8), ("5", 0.2), "}"],
        "-3.5",
        (2, 6),
        0.4,
    ),
    "interval": (
        [
            *OPEN,
            *[("[", 0.8), ("2", 0.2), ("0", 0.8), (".", 0.2), ("3", 0.8), (",", 0.2)],
            *[(" ", 0.8), ("3", 0.2), ("0", 0.8), (".", 0.2), ("8", 0.8), ("]}", 0.2)],
        ],
        "[20.3, 30.8]",
        (3, 15),
        0.4,
    ),
    "grounded answer": (
        [
            *OPEN,
            *[("A", 0.8), (" <>", 0.2), (" [", 0.8), ("2", 0.2), ("0", 0.8), (".", 0.2), ("3", 0.8)],
            *[(",", 0.2), (" ", 0.8), ("3", 0.2), ("0", 0.8), (".", 0.2), ("8", 0.8), ("]}", 0.2)],
        ],
        "A <> [20.3, 30.8]",
        (3, 17),
        0.4,
    ),
    "fraction": (
        [
            *["\\", "boxed", ("{\\", 0.8), ("frac", 0.4), ("{", 0.2)],
            *[("1", 0.8), ("}{", 0.2), ("2", 0.8), ("}}", 0.2)],
        ],
        "\\frac{1}{2}",
        (2, 9),
        0.4,
    ),
    "LaTeX text": (
        ["\\", "boxed", ("{\\", 0.8), ("text", 0.4), ("{", 0.2), ("B", 0.8), ("}}", 0.2)],
        "\\text{B}",
        (2, 7),
        0.4,
    ),
    "escaped braces": (
        [
            *["\\", "boxed", ("{\\", 0.8), ("{", 0.2), ("1", 0.8), (",", 0.2)],
            *[(" ", 0.8), ("2", 0.2), ("\\", 0.8), ("}}", 0.2)],
        ],
        "\\{1, 2\\}",
        (2, 10),
        0.4,
    ),
    "formula": (["\\", "boxed", ("{x", 0.8), (" -", 0.2), (" ", 0.8), ("1", 0.2), "}"], "x - 1", (2, 6), 0.4),
    "Chinese": ([*OPEN, ("左边", 0.8), ("的", 0.4), ("杯子", 0.2), "}"], "左边的杯子", (3, 6), 0.4),
    "Chinese, in bytes": ([*OPEN, (BROKEN, 0.81), (BROKEN, 0.49), "}"], "龘", (3, 5), 0.63),
    "Arabic": (
        [*OPEN, ("ال", 0.8), ("كرة", 0.4), (" الح", 0.2), ("مر", 0.8), ("اء", 0.2), "}"],
        "الكرة الحمراء",
        (3, 8),
        0.4,
    ),
    "emoji": ([*OPEN, ("🏀", 0.8), ("🇨", 0.4), ("🇭", 0.2), "}"], "🏀🇨🇭", (3, 6), 0.4),
    "hieroglyph, in bytes": ([*OPEN, (BROKEN, 0.8), (BROKEN, 0.4), (BROKEN, 0.2), "}"], "𓀀", (3, 6), 0.4),
    "accents": ([*OPEN, ("na", 0.8), ("ï", 0.2), ("ve", 0.8), (" café", 0.2), "}"], "naïve café", (3, 7), 0.4),
}
TAIL = "it moves</think>\\boxed{(C)}"


def spell(tokens):
    """The tokens of a row, and their probabilities."""
    pairs = [token if isinstance(token, tuple) else (token, 0.001) for token in tokens]
    return [piece for piece, _ in pairs], [probability for _, probability in pairs]


def box_text(tokens, text):
    """The box of a row as text (its tokens alone do not tell, where one is a part of a character)."""
    pieces, _ = spell(tokens)
    joined = "".join(pieces)
    return joined if BROKEN not in joined else f"\\boxed{{{text}}}"


@pytest.mark.parametrize("flavour", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize(("tokens", "text", "span", "confidence"), BOXES.values(), ids=BOXES)
def test_first_answers(flavour, tokens, text, span, confidence):
    tokenizer = qwen(flavour)
    pieces, probabilities = spell(tokens)
    box = box_text(tokens, text)
    assert tokenizer.pieces(box) == pieces, "the row spells the box as the tokenizer does"
    ids = tokenizer.encode(box)
    got = score_first_answer(ids, [math.log(p) for p in probabilities], tokenizer.decode)
    assert (got.text, got.token_span) == (text, span)
    assert got.confidence == pytest.approx(confidence, rel=1e-12)
    assert got.content == box[len("\\boxed{") : -1]

    # the same from everything that was generated: what follows the box changes nothing
    for think in ("<think>", "\n<think>", " <think>"):
        ids = [*tokenizer.encode(box + think + TAIL), END_OF_TURN]
        logprobs = [math.log(p) for p in probabilities] + [math.log(0.001)] * (len(ids) - len(pieces))
        assert score_first_answer(ids, logprobs, tokenizer.decode) == got


@pytest.mark.parametrize("flavour", ["qwen2.5", "qwen3"])
@pytest.mark.parametrize(
    "output",
    [
        "",
        "It is red.",
        "\\boxed{A",
        "\\boxed{\\frac{1}{2}",
        "\\boxed{A<think>r</think>\\boxed{B}",
        "\\boxed{}<think>r</think>\\boxed{B}",
        "\\boxed{ \n }<think>r</think>\\boxed{B}",
        "<think>r</think>\\boxed{B}",
        "<think>\\boxed{A}</think>\\boxed{B}",
        "r</think>\\boxed{B}",
        "\\boxed{Let's analyze the problem step by step.}<think>r</think>\\boxed{B}",
        "\\boxed{ Let's analyze}<think>r</think>\\boxed{B}",
        "\\boxed{\nLet’s analyze the video.}",
        "\\boxed{\\text{Let's analyze the problem step by step.}}",
    ],
)
def test_no_direct_answer(flavour, output):
    tokenizer = qwen(flavour)
    for ids in (tokenizer.encode(output), [*tokenizer.encode(output), END_OF_TURN]):
        assert score_first_answer(ids, [-0.1] * len(ids), tokenizer.decode) is None


def test_text_before_the_box_is_not_counted():
    tokenizer = qwen("qwen3")
    ids = tokenizer.encode("The answer is B: \\boxed{B}")
    assert tokenizer.pieces("The answer is B: \\boxed{B}") == [
        *["The", " answer", " is", " B", ":", " \\", "boxed", "{", "B", "}"]
    ]
    got = score_first_answer(ids, [-9.0] * 8 + [math.log(0.9), -9.0], tokenizer.decode)
    assert (got.text, got.token_span) == ("B", (8, 9))
    assert got.confidence == pytest.approx(0.9)


def test_the_first_box_counts():
    tokenizer = qwen("qwen3")
    ids = tokenizer.encode("\\boxed{A}\\boxed{B}")
    assert score_first_answer(ids, [-1.0] * len(ids), tokenizer.decode).token_span == (3, 4)


# Tokens that no trained tokenizer has, and that straddle in every way
@pytest.mark.parametrize(
    ("pieces", "text", "span", "confidence"),
    [
        ([("\\boxed{A}<think>", 0.9)], "A", (0, 1), 0.9),
        (["\\box", ("ed{(B", 0.9), ")}"], "B", (1, 2), 0.9),
        (["\\boxed", ("{Be", 0.81), ("fore}", 0.49)], "Before", (1, 3), 0.63),
        (["\\boxed{ ", " ", ("a", 0.81), (" b", 0.49), " ", " }"], "a b", (2, 4), 0.63),
        (["\\boxed{", b"\xe4", b"\xbd", b"\xa0"], None, None, None),
        (["\\boxed", (b"{\xe4", 0.8), (b"\xbd", 0.4), (b"\xa0}", 0.2)], "你", (1, 4), 0.4),
        (["\\boxed{(", ("B", 0.9), b")\xe4", b"\xbd\xa0}"], "B", (1, 2), 0.9),
        (["\\boxed{", ("\ufffd", 0.9), "}"], "\ufffd", (1, 2), 0.9),
        (["\\boxed{", (b"\xff", 0.81), (b"\xe4", 0.49), "}"], "\ufffd\ufffd", (1, 3), 0.63),
    ],
)
def test_tokens_that_straddle(pieces, text, span, confidence):
    spelled, probabilities = spell(pieces)
    tokenizer = BytePieces([piece if isinstance(piece, bytes) else piece.encode() for piece in spelled])
    got = score_first_answer(tokenizer.ids, [math.log(p) for p in probabilities], tokenizer.decode)
    assert (got and got.text) == text
    if confidence is not None:
        assert got.token_span == span
        assert got.confidence == pytest.approx(confidence, rel=1e-12)


def test_skipped_and_stripped_tokens_keep_the_span():
    tokenizer = BytePieces([b"<start>", b" \\boxed{", b"B", b"<pad>", b"e", b"}"])
    decode = stripping(skipping(tokenizer.decode, {0, 3}))
    got = score_first_answer(tokenizer.ids, [-9.0, -9.0, math.log(0.8), math.log(0.4), math.log(0.2), -9.0], decode)
    assert (got.text, got.token_span) == ("Be", (2, 5))
    assert got.confidence == pytest.approx(0.4)


def test_byte_fallback():
    ids, decode = byte_fallback("\\boxed{你}", set("\\boxed{}"))
    assert len(ids) == 11
    got = score_first_answer(ids, [-9.0] * 7 + [math.log(p) for p in (0.8, 0.4, 0.2)] + [-9.0], decode)
    assert (got.text, got.token_span) == ("你", (7, 10))
    assert got.confidence == pytest.approx(0.4)


CHOICES = {
    "B": [
        *["B", " B ", "B.", "B)", "B:", "B -", "(B)", "( B )", "(B).", "(B):", "(B) ", "B .", "\nB.\n"],
        *["B. text", "B) text", "B)text", "B: text", "B - text", "B  -  text", "(B) text", "(B): text", "B. U.S."],
        *["B.\ntext", "B)\ntext", "B:\ntext", "(B)\ntext", "B.左边", "B:左边", "(B)左边"],
    ],
    "b": ["b", "b.", "b)", "(b)", "b. text", "b) text", "(b) text"],
}
NO_CHOICES = [
    *["A dog", "Before", "AB", "BC.", "A, C", "A and C", "A/B", "A;", "[B]", "{B}", "B}", "-A", "Answer: B"],
    *["X-ray", "T-shirt", "B -text", "B- text", "U.S.", "U.S. flag", "A.M.", "B.text", "A:B", "(A)(B)", "(A), (B)"],
    *["x - 1", "y: 3", "(x)^2", "(x)=2", "(1)", "1.", "1) one", "3 - 1", "É", "É.", "Б)", "Ａ", "（A）"],
    *["A <> [1.5, 2.0]", "(A) <> [1.5, 2.0]", "A. red <> [1.5, 2.0]", "[1.5, 2.0]"],
    *["\\text{B}", "\\text{(B)}", "$B$", "**B**", ".", ")", "()", "( )", ""],
]


@pytest.mark.parametrize(
    ("letter", "content"), [(letter, content) for letter in CHOICES for content in CHOICES[letter]]
)
def test_a_choice_counts_as_its_letter(letter, content):
    start, end = answer_span(content)
    assert content[start:end] == letter


@pytest.mark.parametrize("content", NO_CHOICES)
@pytest.mark.parametrize("space", ["", " ", "\n\t", "\u3000"])
def test_everything_else_counts_whole(content, space):
    start, end = answer_span(space + content + space)
    assert (space + content + space)[start:end] == content
    assert start <= end


def score_letter(*logprobs):
    """Score an answer of as many one-character tokens as there are log-probs."""
    tokenizer = BytePieces([b"\\boxed{", *[b"x"] * len(logprobs), b"}"])
    return score_first_answer(tokenizer.ids, [0.0, *logprobs, 0.0], tokenizer.decode)


@pytest.mark.parametrize(
    ("logprobs", "confidence"),
    [
        ((0.0,), 1.0),
        ((-0.0, 0.0), 1.0),
        ((-math.inf,), 0.0),
        ((-math.inf, 0.0), 0.0),
        ((-1000.0,), 0.0),
        ((-1e308, -1e308), 0.0),
        ((1e-7, 0.0), 1.0),  # a rounding error above zero is no confidence above one
        ((math.nan,), math.nan),
        ((0.0, math.nan), math.nan),
        ((math.inf,), math.nan),
        ((math.inf, -math.inf), math.nan),
        ((0.5,), math.nan),
    ],
)
def test_log_probs_at_the_edges(logprobs, confidence):
    got = score_letter(*logprobs).confidence
    assert isinstance(got, float)
    assert got == confidence or (math.isnan(got) and math.isnan(confidence))


def test_a_broken_log_prob_elsewhere_does_not_matter():
    tokenizer = BytePieces([b"\\boxed{", b"A", b"}"])
    assert score_first_answer(tokenizer.ids, [math.nan, -0.0, math.nan], tokenizer.decode).confidence == 1.0


def test_means_are_summed_exactly():
    assert score_letter(*[-0.1] * 10).confidence == math.exp(-0.1)


def test_a_log_prob_for_each_token():
    tokenizer = BytePieces([b"\\boxed{A}"])
    with pytest.raises(ValueError, match=r"1 token ids but 2 log-probs"):
        score_first_answer(tokenizer.ids, [0.0, 0.0], tokenizer.decode)


@pytest.mark.parametrize(
    ("confidence", "threshold", "exits"),
    [
        (0.97, 0.97, True),
        (0.96999, 0.97, False),
        (1.0, 1.0, True),
        (0.0, 0.0, True),
        (math.nan, 0.0, False),
        (1.0, math.nan, False),
    ],
)
def test_should_exit(confidence, threshold, exits):
    assert should_exit(ScoredAnswer("A", (3, 4), confidence, "A"), threshold) is exits


def test_without_a_direct_answer_there_is_no_exit():
    assert should_exit(None, 0.0) is False


def test_tokens_after_the_first_box_cost_nothing():
    tokenizer = BytePieces([b"\\boxed{A}", b"<think>", *[b"word "] * 4000])
    score_first_answer(tokenizer.ids, [0.0] * len(tokenizer.ids), tokenizer.decode)
    assert tokenizer.decoded_ids == 1
    tokenizer = BytePieces([b"<think>", *[b"word "] * 4000])
    score_first_answer(tokenizer.ids, [0.0] * len(tokenizer.ids), tokenizer.decode)
    assert tokenizer.decoded_ids == 1
