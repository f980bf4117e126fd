"""What the reasoner returns: the events of a stream and the final answer, as plain data.

A stream yields a `FirstAnswer` as soon as the first box closes, then `ReasoningDelta`s while the model reasons, and an
`Answer` last. Nothing here holds arrays or handles, so an `Answer` can be kept, compared, pickled or written as JSON.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Answer", "Event", "FirstAnswer", "Option", "ReasoningDelta", "Usage"]


@dataclass(frozen=True)
class Option:
    """A choice of a multiple-choice question.

    Attributes:
        index: from 0.
        text: the choice as it was given, without a letter.
        letter: the letter that the model was shown with it.
    """

    index: int
    text: str
    letter: str


@dataclass(frozen=True)
class FirstAnswer:
    """The direct answer, yielded at the moment its box closes.

    Attributes:
        text: the content of the first box as it was written.
        confidence: exp(mean log p) of the normalised answer's tokens, in [0, 1]; None when the model declined to answer
            directly (the fallback sentence) or left the box empty.
        threshold: what the confidence was compared with.
        reasons: whether the model continues to reason.
        option: the choice that the text names; None: there are no choices, or it names none.
    """

    text: str
    confidence: float | None
    threshold: float
    reasons: bool
    option: Option | None = None


@dataclass(frozen=True)
class ReasoningDelta:
    """A piece of the reasoning, without its marks; all of them together are `Answer.reasoning`."""

    text: str


@dataclass(frozen=True)
class Usage:
    """What an answer cost.

    Attributes:
        prompt_tokens: length of the whole prompt, the video included.
        video_tokens: how many of them are visual.
        cached_tokens: how many of them were not computed for this question, because the clip's prefix already was.
        first_answer_tokens: generated up to and with the token that closes the first box.
        reasoning_tokens: generated after it.
        media_seconds: reading, resizing and cutting the frames (0 for a follow-up question, as is `vision_seconds`).
        vision_seconds: running the vision tower.
        prefill_seconds: running the prompt through the language model.
        first_answer_seconds: generating the first answer.
        reasoning_seconds: generating the rest.
        peak_memory_bytes: the most that MLX's allocator held at once while it worked on this question.
    """

    prompt_tokens: int = 0
    video_tokens: int = 0
    cached_tokens: int = 0
    first_answer_tokens: int = 0
    reasoning_tokens: int = 0
    media_seconds: float = 0.0
    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    first_answer_seconds: float = 0.0
    reasoning_seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def generated_tokens(self) -> int:
        """All tokens that were generated."""
        return self.first_answer_tokens + self.reasoning_tokens

    @property
    def total_seconds(self) -> float:
        """The sum of the times above."""
        return (
            self.media_seconds
            + self.vision_seconds
            + self.prefill_seconds
            + self.first_answer_seconds
            + self.reasoning_seconds
        )


@dataclass(frozen=True)
class Answer:
    r"""The answer to one question about one clip.

    Attributes:
        text: the answer that counts: the second box when the model reasoned, else the first; when the boxes are
            missing, the text outside `<think>`; empty when there is none.
        confidence: of the first answer (see `FirstAnswer`); None: there was no direct answer.
        reasoned: whether the model continued after the first box.
        first: content of the first box, or None.
        reasoning: the text between `<think>` and `</think>`, or None.
        second: content of the second box, or None.
        threshold: what the confidence was compared with.
        problems: how the output departs from ``\boxed{..}<think>..</think>\boxed{..}``; empty when it does not.
            An early exit is not a departure. The words are those of `mlxvr.answering.transcript.Transcript.problems`.
        token_ids: everything that was generated.
        token_logprobs: natural log of each token's probability under the model's own (temperature 1) distribution.
        usage: what it cost.
        option: the choice that `text` names, whether as `B`, `(B)`, `B. blue` or `blue`; None: there are no choices, or
            it names none.
        first_option, second_option: likewise of `first` and `second`.
    """

    text: str
    confidence: float | None
    reasoned: bool
    first: str | None
    reasoning: str | None
    second: str | None
    threshold: float
    problems: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    token_logprobs: tuple[float, ...] = field(default=(), repr=False)
    usage: Usage = field(default_factory=Usage)
    option: Option | None = None
    first_option: Option | None = None
    second_option: Option | None = None

    @property
    def hit_limit(self) -> bool:
        """Whether the model was stopped by the limit of tokens, or by the end of its context, while it wrote."""
        return "token_limit" in self.problems

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, nested, with `hit_limit` and the sums of `usage`.

        A number that is not finite becomes None.
        """
        fields = asdict(self) | {"hit_limit": self.hit_limit}
        sums = {"generated_tokens": self.usage.generated_tokens, "total_seconds": self.usage.total_seconds}
        fields["usage"] = fields["usage"] | sums
        fields["confidence"] = _finite(self.confidence)
        fields["token_logprobs"] = [_finite(logprob) for logprob in self.token_logprobs]
        return fields


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


Event = FirstAnswer | ReasoningDelta | Answer
