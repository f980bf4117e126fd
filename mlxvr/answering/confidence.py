r"""How sure the direct answer is, and whether that is sure enough to stop.

The confidence of the first box is exp(mean log p) over the tokens of its normalised content, under the model's own
distribution at temperature 1 (arXiv 2601.05175, inference). Normalised means that a choice counts as its letter alone:
``(B)``, ``B.``, ``B) a dog``, ``B: a dog`` and ``B - a dog`` are ``B``; everything else is the whole content.

From characters to tokens: the box is found in the text, its normalised content is a span of characters, and the tokens
that overlap that span count. ``\boxed{(B)}`` is ``{(`` ``B`` ``)}`` and its confidence is p(``B``); ``\boxed{[1.5,
2.0]}`` ends in ``]}``, which counts since it carries the bracket.

Departures from the public evaluator
- It encodes the normalised content anew and looks for those ids from the start of the output, so it can find another
  place, or none where a token straddles the box. Overlap always finds the answer's own place.
- Its letter patterns also take ``X-ray``, ``U.S.``, ``x - 1``, ``[B]`` and the letter of ``(A) <> [1.5, 2.0]``, whose
  interval is half of the answer. Here a letter needs the separators above, set apart from what follows (``A.M.`` is no
  choice); a lower-case letter, common in formulas, only counts alone and with ``.`` or ``)``; and an answer in two
  parts (``<>``) counts as a whole. When in doubt the whole content counts, which may cost some reasoning but no wrong
  exit.
- It returns ``-1`` for "no answer"; here that is None.

Where the model's turn has a response prefix (``\boxed{Answer:``, as the public evaluation writes for MVP), the answer
is what the model adds to it, and only its last token counts, as in that evaluation.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlxvr.answering.transcript import DualAnswerParser, is_fallback

__all__ = ["ScoredAnswer", "answer_span", "score_first_answer", "should_exit"]

_APART = r"(?= \s | \Z | [^\x00-\x7f] )"  # a script without spaces may follow at once
_LETTER = re.compile(
    rf"""\s*(?:
      \( \s* (?P<enclosed> [A-Za-z] ) \s* \) [.:]? {_APART}            # (B)   (B) a dog   (B): a dog
    | (?P<marked> [A-Za-z] ) \s* (?: \) | \. {_APART} )               # B)    B) a dog    B.   B. a dog
    | (?P<named> [A-Z] ) (?: \s* : {_APART} | \s+ - (?= \s | \Z ) )   # B: a dog          B - a dog
    | (?P<alone> [A-Za-z] ) \s* \Z
    )""",
    re.VERBOSE,
)
_TWO_PARTS = "<>"
_ROUNDING = 1e-3  # a log-probability may be this much above zero; more is not a log-probability
_LEAST = -1e300  # below every log-probability that matters; a sum of such values is still finite


@dataclass(frozen=True)
class ScoredAnswer:
    """A direct answer and how sure the model is of it.

    Attributes:
        text: the normalised answer: the letter of a choice, else the content of the box without outer white space.
        token_span: the tokens [start, end) that overlap it, counted in what was generated.
        confidence: exp of their mean log-probability, in [0, 1]; nan when one of them is not a log-probability.
        content: the box as it was written.
    """

    text: str
    token_span: tuple[int, int]
    confidence: float
    content: str


def score_first_answer(
    token_ids: Sequence[int],
    token_logprobs: Sequence[float],
    detokenize: Callable[[list[int]], str],
    *,
    response_prefix_tokens: int = 0,
) -> ScoredAnswer | None:
    """Find the direct answer in the generated tokens, and compute its confidence.

    Args:
        token_ids: everything generated so far; what follows the first box changes nothing.
        token_logprobs: natural log of each token's probability at temperature 1; -inf gives confidence 0.
        detokenize: token ids -> text.
        response_prefix_tokens: number of tokens at the start that are the response prefix, not the model's. They are no
            part of the answer, and only the last token of what follows counts.

    Returns:
        None when there is no direct answer to be sure of: no box before the reasoning, a box that is not closed, an
        empty one, or one that declines to answer directly.

    Raises:
        ValueError: the two sequences differ in length.
    """
    if len(token_ids) != len(token_logprobs):
        raise ValueError(f"{len(token_ids)} token ids but {len(token_logprobs)} log-probs: give one for each token")
    parser = DualAnswerParser(detokenize)
    for token_id in token_ids:
        parser.push(token_id)
        if parser.stage not in ("start", "first_box"):
            break
    if parser.first_span is None:
        return None
    offset, end = parser.first_span
    if response_prefix_tokens:
        offset = min(max(offset, parser.token_spans[response_prefix_tokens - 1][1]), end)
    content = parser.text[offset:end]
    start, stop = answer_span(content)
    if start == stop or is_fallback(content):
        return None
    tokens = _overlapping(parser.token_spans, offset + start, offset + stop)
    if not tokens:
        return None
    if response_prefix_tokens:
        tokens = tokens[-1:]
    return ScoredAnswer(
        text=content[start:stop],
        token_span=(tokens.start, tokens.stop),
        confidence=_mean_probability([float(token_logprobs[token]) for token in tokens]),
        content=content,
    )


def answer_span(content: str) -> tuple[int, int]:
    """Characters [start, end) of a box's normalised answer: a choice's letter, else all but outer white space."""
    letter = None if _TWO_PARTS in content else _LETTER.match(content)
    if letter is not None:
        return letter.span(letter.lastgroup or 0)
    start = len(content) - len(content.lstrip())
    return start, max(start, len(content.rstrip()))


def should_exit(first: ScoredAnswer | None, threshold: float) -> bool:
    """Whether to stop with the direct answer: there is one, and it is at least as sure as `threshold`."""
    return first is not None and first.confidence >= threshold


def _overlapping(spans: list[tuple[int, int]], start: int, end: int) -> range:
    """From the first to the last token that covers a character of [start, end)."""
    tokens = [token for token, (begin, stop) in enumerate(spans) if begin < end and stop > start]
    return range(tokens[0], tokens[-1] + 1) if tokens else range(0)


def _mean_probability(logprobs: list[float]) -> float:
    """The geometric mean of probabilities given by their logs."""
    if not all(logprob <= _ROUNDING for logprob in logprobs):
        return math.nan
    total = math.fsum(max(logprob, _LEAST) for logprob in logprobs)
    return math.exp(min(total / len(logprobs), 0.0))
