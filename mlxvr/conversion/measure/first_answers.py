r"""First answers to many prompts, written in lock-step by a model that runs layer by layer.

The assistant turn begins with ``\boxed``, so that a model that was not trained for the protocol also answers in a box.
An answer ends where the product would stop without reasoning: when the first box closes, when the reasoning begins, at
the end of the turn, or at a limit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlxvr.answering.confidence import ScoredAnswer, score_first_answer
from mlxvr.answering.transcript import DualAnswerParser
from mlxvr.conversion.measure.layerwise import LayerwiseModel, Track
from mlxvr.model.decode import not_finite
from mlxvr.model.tokenizer import ChatTokenizer
from mlxvr.runtime.hooks import ShouldStop

__all__ = ["MOST_TOKENS", "Draft", "choose_greedily", "opening", "write_answers"]

MOST_TOKENS = 24  # the opening included; a box with two times and an answer has some 16


def opening(tokenizer: ChatTokenizer) -> list[int]:
    """The tokens that every answer begins with."""
    return tokenizer.encode(r"\boxed")


@dataclass(eq=False)
class Draft:
    """A first answer while it is written; it holds no weights, so that the model can be freed.

    Attributes:
        tokenizer: the model's.
        track: prompt and answer on their way through the layers.
        suppression: float32 (vocab,), see `mlxvr.model.decode.suppression`.
        row: float32 (vocab,), the logits of the next token.
        rows: recorded logits (tokens, vocab): those that the draft begins with, then those of every token but the
            first, whose logits are the last of the prompt's.
        tokens: the tokens written so far.
        logprobs: natural log of each token's probability.
        ended: whether the answer is finished.
    """

    tokenizer: ChatTokenizer
    track: Track
    suppression: mx.array
    row: mx.array
    rows: list[mx.array] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        self._parser = DualAnswerParser(self.tokenizer.decode)

    @property
    def closed(self) -> bool:
        """Whether the first box is closed."""
        return self._parser.first_closed

    @property
    def scored(self) -> ScoredAnswer | None:
        """The answer and its confidence, scored as in the product."""
        return score_first_answer(self.tokens, self.logprobs, self.tokenizer.decode)

    def take(self, token: int) -> None:
        """Append a token."""
        if self.tokens:
            self.rows.append(self.row[None])
        self.tokens.append(token)
        self.logprobs.append(float((self.row[token] - mx.logsumexp(self.row)).item()))  # type: ignore[arg-type]
        if token in self.tokenizer.eos_ids:
            self.ended = True
            return
        self._parser.push(token)
        self.ended = self.closed or self._parser.stage == "reasoning" or len(self.tokens) >= MOST_TOKENS

    def fork(self) -> "Draft":
        """A second answer that begins with the same tokens."""
        forked = Draft(
            self.tokenizer, self.track.fork(), self.suppression, self.row, [], [*self.tokens], [*self.logprobs]
        )
        for token in self.tokens:
            forked._parser.push(token)
        return forked


def choose_greedily(draft: Draft) -> int:
    """The next token of an answer: first the opening's tokens, then the likeliest token."""
    first_tokens = opening(draft.tokenizer)
    place = len(draft.tokens)
    if place < len(first_tokens):
        return first_tokens[place]
    return int(mx.argmax(draft.row + draft.suppression).item())  # type: ignore[arg-type]


def write_answers(
    model: LayerwiseModel,
    drafts: Sequence[Draft],
    choose: Callable[[Draft], int] = choose_greedily,
    *,
    on_token: Callable[[], None] | None = None,
    should_stop: ShouldStop | None = None,
) -> None:
    """Extend all drafts by one token at a time, until all have ended.

    Args:
        model: computes the logits.
        drafts: the answers so far; they are extended in place.
        choose: chooses the next token of a draft.
        on_token: called after each token.
        should_stop: see `LayerwiseModel.step`.

    Raises `ConfigError` or `CheckpointError` when the logits are not finite, see `mlxvr.model.decode.not_finite`.
    """
    while unfinished := [draft for draft in drafts if not draft.ended]:
        for draft in unfinished:
            draft.take(choose(draft))
            if not math.isfinite(draft.logprobs[-1]):
                raise not_finite(model.model)
        if unfinished := [draft for draft in unfinished if not draft.ended]:
            tracks, tokens = [draft.track for draft in unfinished], [draft.tokens[-1] for draft in unfinished]
            for draft, row in zip(unfinished, model.step(tracks, tokens, should_stop=should_stop)):
                draft.row = row
        if on_token is not None:
            on_token()
