r"""Think once, answer twice: the decision loop over a stream of tokens.

The model writes ``\boxed{a1}<think>r</think>\boxed{a2}``. The loop reads tokens as they are decoded, scores a1 at the
token that closes its box, and there decides whether to go on (arXiv 2601.05175, inference). Going on means taking the
next token from the same iterator, so nothing is computed twice; stopping means not taking it.

Departure from the public evaluator, which decodes the whole chain and chooses afterwards: the tokens here are the same,
but those after an early exit are never generated.

The loop knows tokens, log-probabilities and text, and nothing of MLX, so that it can be tested with scripted tokens.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Literal, Protocol, TypedDict, get_args

from mlxvr.answering.confidence import ScoredAnswer, score_first_answer, should_exit
from mlxvr.answering.events import Answer, Event, FirstAnswer, Option, ReasoningDelta, Usage
from mlxvr.answering.sampling_config import SamplingConfig, is_number
from mlxvr.answering.transcript import DualAnswerParser, Transcript, is_fallback, parse
from mlxvr.cli.settings import flag
from mlxvr.data.option_letters import strip_letters
from mlxvr.errors import ConfigError
from mlxvr.grading.choices import find_choice

__all__ = [
    "AskKeywords",
    "AskRequest",
    "Kind",
    "Mode",
    "Outcome",
    "TokenLike",
    "make_answer",
    "run_answer_loop",
]

Kind = Literal["qa", "grounding", "grounded_qa"]
Mode = Literal["auto", "direct", "think"]


@dataclass(frozen=True)
class AskRequest(SamplingConfig):
    r"""A question and how to answer it, with the fields of `SamplingConfig`; refuses values that cannot be used.

    Attributes:
        text: the question, or for `grounding` the description of the segment to find.
        options: the choices of a multiple-choice question; any sequence of texts, kept as a tuple. The model is shown
            them with letters; where each has its letter already (`A. red`, `B. blue`), the letter is removed.
        kind: which of the public prompts is used.
        mode: "auto" reasons only when the first answer is not sure enough; "direct" never; "think" always.
        threshold: confidence at which "auto" takes the first answer, in [0, 1]; None: the checkpoint's own.
        response_prefix: text that the model's turn starts with, such as ``\boxed{Answer:``; "": the model writes all of
            it. It is no part of the answer, and only the last token of what follows it in the first box counts for
            confidence.
        options_may_repeat: accept choices that are equal, as some rows of public benchmarks have them.
    """

    text: str
    options: Sequence[str] | None = None
    kind: Kind = field(default="qa", metadata=flag("question", "which prompt to use"))
    mode: Mode = field(
        default="auto", metadata=flag("sampling", "think when the first answer is not sure, never, or always")
    )
    threshold: float | None = field(
        default=None,
        metadata=flag("sampling", "confidence that is sure enough (default: the checkpoint's own)", metavar="T"),
    )
    response_prefix: str = ""
    options_may_repeat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "options", self._checked_options(_choices(self.options)))
        if not isinstance(self.text, str) or not self.text.strip():
            raise ConfigError("the question is empty: ask something, for example 'What happens at the end?'")
        for name, value, allowed in (
            ("kind", self.kind, get_args(Kind)),
            ("mode", self.mode, get_args(Mode)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} {value!r} is unknown: use one of {', '.join(allowed)}")
        if self.threshold is not None and not is_number(self.threshold):
            raise ConfigError(f"threshold {self.threshold!r} is no number: give one such as 0.97")
        if not isinstance(self.response_prefix, str):
            raise ConfigError(f"response_prefix {self.response_prefix!r} is no text: give one, or leave it out")
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"threshold {self.threshold} is outside [0, 1]: it is compared with a probability")
        prefix = parse(self.response_prefix)
        if prefix.first is not None or prefix.reasoning is not None:
            raise ConfigError(f"response_prefix {self.response_prefix!r} leaves no direct answer to give: close no box")

    def without_effect(self) -> str:
        """One line that names the options that change nothing beside the others; empty if there are none."""
        idle = [name for name, is_set in (("top_p", self.top_p < 1.0), ("seed", self.seed is not None)) if is_set]
        if self.temperature > 0 or not idle:
            return ""
        return f"without effect: {', '.join(idle)}, as temperature 0 decodes greedily"

    def _checked_options(self, options: tuple[str, ...]) -> tuple[str, ...] | None:
        options = tuple(strip_letters(options))
        places: dict[str, int] = {}
        for number, option in enumerate(options, 1):
            first = places.setdefault(option.strip(), number)
            if first != number and not self.options_may_repeat:
                raise ConfigError(f"options {first} and {number} are both {option.strip()!r}: give every choice once")
        return options or None


def _choices(options: object) -> tuple[str, ...]:
    """The options of a question as a tuple; raises `ConfigError` where they are no texts, or empty."""
    if options is None:
        return ()
    if isinstance(options, str) or not isinstance(options, Iterable):
        raise ConfigError(f"options {options!r} are no list of texts: give one such as ['left', 'right']")
    choices = tuple(options)
    for number, choice in enumerate(choices, 1):
        if not isinstance(choice, str):
            raise ConfigError(f"option {number} is {choice!r}, no text: give every choice as a text")
        if not choice.strip():
            raise ConfigError(f"option {number} is empty: give every choice a text")
    return choices


class AskKeywords(TypedDict, total=False):
    """The keywords of `Clip.ask` and `Clip.stream`: the fields of `AskRequest` beside the question."""

    options: Sequence[str] | None
    kind: Kind
    mode: Mode
    threshold: float | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    response_prefix: str
    options_may_repeat: bool


class TokenLike(Protocol):
    """What the loop reads of a decoded token."""

    @property
    def id(self) -> int:
        """The token's id."""

    @property
    def logprob(self) -> float:
        """Natural log of its probability at temperature 1."""


@dataclass
class Outcome:
    """What the loop has seen so far; complete once its iterator is exhausted.

    Attributes:
        scored: the scored first answer, None while there is none or when it has no confidence.
        exited: whether the loop stopped at the first box.
        first_answer_tokens: tokens up to and with the one that closes the first box (all of them if none does).
        first_answer_seconds, reasoning_seconds: time before and after that token.
    """

    token_ids: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    scored: ScoredAnswer | None = None
    exited: bool = False
    transcript: Transcript | None = None
    first_answer_tokens: int = 0
    first_answer_seconds: float = 0.0
    reasoning_seconds: float = 0.0


def run_answer_loop(
    tokens: Iterable[TokenLike],
    detokenize: Callable[[list[int]], str],
    outcome: Outcome,
    *,
    mode: Mode,
    threshold: float,
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    response_prefix_ids: Sequence[int] = (),
    options: Sequence[str] = (),
) -> Iterator[Event]:
    """Read tokens, yield `FirstAnswer` and `ReasoningDelta` events, and fill `outcome`.

    Args:
        tokens: decoded one by one; a token is only taken when it is needed.
        detokenize: ids to text, special tokens included.
        outcome: filled as the tokens come.
        mode: see `AskRequest`.
        threshold: see `AskRequest`.
        max_tokens: stop after this many.
        stop_ids: end-of-turn tokens: recorded, never part of the text.
        response_prefix_ids: the tokens of the response prefix, before `tokens`; neither recorded nor counted.
        options: the choices, without letters; empty: there are none.

    Raises `ConfigError` when the confidence is not a number, which does not mean that the model is unsure.
    """
    parser = DualAnswerParser(detokenize)
    for prefix_id in response_prefix_ids:
        parser.push(prefix_id)
    prefix_characters = parser.token_spans[-1][1] if response_prefix_ids else 0
    started = time.perf_counter()
    closed_at: float | None = None
    ended = False
    for token in tokens:
        outcome.token_ids.append(token.id)
        outcome.token_logprobs.append(token.logprob)
        if token.id in stop_ids:
            ended = True
            break
        parser.push(token.id)
        if closed_at is not None:
            if piece := parser.take_reasoning():
                yield ReasoningDelta(piece)
        elif parser.first_closed:
            closed_at = time.perf_counter()
            outcome.first_answer_tokens = len(outcome.token_ids)
            outcome.scored = score_first_answer(
                [*response_prefix_ids, *outcome.token_ids],
                [*(0.0 for _ in response_prefix_ids), *outcome.token_logprobs],
                detokenize,
                response_prefix_tokens=len(response_prefix_ids),
            )
            if outcome.scored is not None and math.isnan(outcome.scored.confidence):
                raise ConfigError(_NO_CONFIDENCE)
            outcome.exited = mode == "direct" or (mode == "auto" and should_exit(outcome.scored, threshold))
            confidence = None if outcome.scored is None else outcome.scored.confidence
            first = _first_from(parser.text, parser.first_span, prefix_characters)
            chosen = _option(first, options)
            yield FirstAnswer(first or "", confidence, threshold, reasons=not outcome.exited, option=chosen)
            if outcome.exited:
                break
        elif mode == "direct" and parser.stage == "reasoning":
            break  # it began to reason without a first box: there is no direct answer to wait for
        if len(outcome.token_ids) >= max_tokens:
            break
    hit_limit = not ended and not outcome.exited and len(outcome.token_ids) >= max_tokens
    outcome.transcript = _without_response_prefix(parser.finish(hit_limit=hit_limit), prefix_characters)
    if closed_at is not None and (piece := parser.take_reasoning()):
        yield ReasoningDelta(piece)
    now = time.perf_counter()
    outcome.first_answer_seconds = (now if closed_at is None else closed_at) - started
    outcome.reasoning_seconds = 0.0 if closed_at is None else now - closed_at
    if closed_at is None:
        outcome.first_answer_tokens = len(outcome.token_ids)


def make_answer(outcome: Outcome, threshold: float, usage: Usage, options: Sequence[str] = ()) -> Answer:
    """Make the answer of a finished `Outcome`.

    The answer that counts is the second box; without one the first box, unless it holds the fallback sentence; without
    boxes the text outside `<think>`, as the public evaluation takes it. `options` are the choices, without letters.
    """
    transcript = outcome.transcript
    assert transcript is not None, "the loop has not ended"
    if transcript.second is not None:
        text = transcript.second
    elif transcript.first is not None:
        text = "" if transcript.is_fallback else transcript.first
    else:
        text = transcript.outside
    return Answer(
        text=text,
        confidence=None if outcome.scored is None else outcome.scored.confidence,
        reasoned=not outcome.exited and (transcript.reasoning is not None or transcript.second is not None),
        first=transcript.first,
        reasoning=transcript.reasoning,
        second=transcript.second,
        threshold=threshold,
        problems=tuple(p for p in transcript.problems if not (outcome.exited and p in _MISSING_AFTER_EXIT)),
        token_ids=tuple(outcome.token_ids),
        token_logprobs=tuple(outcome.token_logprobs),
        usage=usage,
        option=_option(text, options),
        first_option=_option(transcript.first, options),
        second_option=_option(transcript.second, options),
    )


def _option(text: str | None, options: Sequence[str]) -> Option | None:
    """The choice that a text names, if any."""
    index = find_choice(text, options)
    return None if index is None else Option(index, options[index], ascii_uppercase[index])


def _without_response_prefix(transcript: Transcript, prefix_characters: int) -> Transcript:
    """A transcript whose direct answer begins after the first `prefix_characters` characters."""
    if not prefix_characters:
        return transcript
    first = _first_from(transcript.text, transcript.first_span, prefix_characters)
    return replace(transcript, first=first, is_fallback=first is not None and is_fallback(first))


def _first_from(text: str, span: tuple[int, int] | None, prefix_characters: int) -> str | None:
    """What the model wrote into the first box, outer white space removed."""
    return None if span is None else text[max(span[0], prefix_characters) : span[1]].strip()


_NO_CONFIDENCE = (
    "the confidence is not a number, because a log-probability of the answer is none: compute in another dtype, such "
    "as --dtype float32"
)
_MISSING_AFTER_EXIT = frozenset({"no_think", "no_second_box"})  # what an early exit leaves out on purpose
