r"""Rewards for rows without an answer, and a guard against what they can do to a model.

A row without a label is judged by its own group. Two scores say how good a reviewed answer a2 looks, each in [0, 1]:

    agreement    m * (1 - 0.25 * (1 - own)). m says how far a2 agrees with the group's majority, own how far its own
                 first answer a1 agrees with it. Agreeing with oneself earns nothing outside the majority, and where a1
                 declines ("Let's analyze ..") there is nothing to disagree with: own is 1
    coherence    sigmoid(mean log p(a2 | prompt, chain) - mean log p(a2 | prompt)): how much more likely the chain makes
                 the answer than it is when it is put directly as the first box

The majority is that of the reviewed answers, by the equality or the IoU of the labelled reward (`rewards.agree`). For
exact_match and math it is the largest class of equal answers, and m is 1 or 0; several largest classes share it, so
that m is one over their number; one answer alone is no majority. For iou and gqa m is the mean agreement with the
reviewed answers of the others, so that the answer in the middle is the majority. Empty answers and answers that decline
have no vote and earn 0.

The reward has the shape of the labelled one, so that both kinds of rows can be mixed (`label_free_reward`):

    s1 = how far a1 agrees with the majority, as m above    s2 = the mean of the scores that are asked for
    R = w_first s1 + w_second s2 + w_format format + w_fallback [a1 declines and s2 > 0.7]

A first answer in the majority earns more than one that declines, which earns more than one outside it, as with labels.
For gqa s1 and s2 stay in [0, 1], where R1 and R2 go to 2.

What this cannot see
- A majority that is sure and wrong. Training makes it surer: what the model mostly says becomes what it always says.
  Only rows with labels, or a validation with labels, show it.
- A chain that leads to an answer from a chain that merely names it. Coherence is high for either, and the less likely
  an answer was directly, the more there is to gain. It is meant to stand beside agreement.
- Whether unanimous groups are solved or collapsed. `CollapseGuard` says that they are unanimous, and a person decides.
"""

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxvr.answering.confidence import answer_span
from mlxvr.answering.detokenizer import Detokenizer
from mlxvr.data.rows import Row
from mlxvr.errors import ConfigError
from mlxvr.grading.reward import Reward, Weights, answers, compare_answers, format_reward
from mlxvr.grpo.rollout_config import LABEL_FREE
from mlxvr.grpo.step.forward import completion_logprobs
from mlxvr.grpo.step.packing import pack
from mlxvr.model.network import VideoModel
from mlxvr.model.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from mlxvr.grpo.step.rollout import Rollout

__all__ = ["PARTS", "CollapseGuard", "GroupAnswer", "agreement", "coherence", "group_answer", "label_free_reward"]

PARTS = LABEL_FREE

_BOX, _END_THINK = "\\boxed{", "</think>"
_OWN = 0.25  # what a first answer that disagrees costs; little, since a review exists to correct
_SURE = 0.7  # as in the labelled reward
_GRADED = ("iou", "gqa")  # kinds in which two answers can agree in part
_SAME = 0.95  # graded answers that agree so far count as one to the guard
_START_STEPS = 5  # of which the mean is the entropy that a run started with
_PAPER = Weights()
_ADVICE = "raise --beta, lower --learning-rate or add labelled rows"


def agreement(texts: Sequence[str], kind: str) -> np.ndarray:
    """How far the reviewed answers of a group agree with its majority, and with their own first answers.

    Args:
        texts: G completions of one prompt, without the tokens that ended them.
        kind: of the row: "exact_match", "math", "iou" or "gqa".

    Returns:
        float64 (G,), in [0, 1]; 0 for an empty answer, and for all where fewer than two answered.

    Raises:
        DataError: answers have to be compared, and the kind is unknown.
        ConfigError: the kind is "math", and `math-verify` is not installed.
    """
    firsts, seconds = _both_answers(texts)
    own = [1.0 if _declines(first) else _agree(first, second, kind) for first, second in zip(firsts, seconds)]
    return _with_majority(seconds, seconds, kind) * (1.0 - _OWN * (1.0 - np.array(own)))


def coherence(model: VideoModel, rollout: "Rollout", *, temperature: float = 1.0) -> np.ndarray:
    r"""How much the chains of a group support their reviewed answers.

    What the answers get after their chains was kept when they were sampled. What they get directly takes one packed
    pass over the prompt, for all of them together: `\boxed{a2}` for each answer that differs from the others. As in a
    direct answer's confidence, a choice counts as its letter alone (`mlxvr.answering.confidence.answer_span`), and so
    do all tokens that overlap what counts.

    Args:
        model: the policy that sampled.
        rollout: of one prompt, with the log-probs of its tokens.
        temperature: that the completions were sampled at; 0 (greedy) counts as 1.

    Returns:
        float64 (G,), in [0, 1]; 0 without `</think>`, and where the reviewed answer is empty or declines.
    """
    scores = np.zeros(len(rollout.completions))
    after = {}  # completion -> answer, its mean log-prob after the chain
    for index, one in enumerate(rollout.completions):
        ids = np.asarray(one.ids).tolist()
        found = _find_reviewed(ids, model.tokenizer)
        if found is not None:
            answer, tokens = found
            after[index] = answer, float(np.mean(np.asarray(one.logprobs, dtype=np.float64)[tokens]))
    if not after:
        return scores
    direct = _direct_logprobs(model, rollout, list(dict.fromkeys(answer for answer, _ in after.values())), temperature)
    for index, (answer, supported) in after.items():
        scores[index] = (1.0 + math.tanh((supported - direct[answer]) / 2.0)) / 2.0  # the sigmoid, without overflow
    return scores


def label_free_reward(
    parts: Mapping[str, np.ndarray], texts: Sequence[str], kind: str, *, weights: Weights = _PAPER
) -> list[Reward]:
    """Bring a group's scores together, as the module says.

    Args:
        parts: "agreement", "coherence" or both, each (G,), in [0, 1].
        texts: the G completions.
        kind: of the row.
        weights: of the reward's parts.

    Returns:
        A reward for each completion; `first` is s1 and `second` s2.

    Raises:
        ConfigError: there is no score, or one of another name; or as `agreement`.
        DataError: the kind is unknown.
        ValueError: scores and completions differ in number.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts:
        raise ConfigError(f"rows without an answer are scored by {' and '.join(PARTS)}, not by {unknown}")
    if any(np.shape(part) != (len(texts),) for part in parts.values()):
        raise ValueError(f"scores of the shapes {[np.shape(part) for part in parts.values()]} for {len(texts)} texts")
    firsts, seconds = _both_answers(texts)
    rewards = []
    for text, said, first, second in zip(
        texts, firsts, _with_majority(firsts, seconds, kind), np.mean(list(parts.values()), axis=0)
    ):
        well_formed, fallback = format_reward(text), float(_declines(said) and second > _SURE)
        total = (
            weights.first * first + weights.second * second + weights.format * well_formed + weights.fallback * fallback
        )
        rewards.append(
            Reward(total=float(total), first=float(first), second=float(second), format=well_formed, fallback=fallback)
        )
    return rewards


@dataclass(frozen=True, kw_only=True)
class GroupAnswer:
    """What a group without a label says, as far as the guard needs it; plain values that can be sent to other ranks.

    Attributes:
        row: the row's id.
        kind: the row's kind.
        question: what it asks, with the options.
        answer: the majority's reviewed answer, one of them; "" without a majority.
        unanimous: whether all reviewed answers are the same, or all of them missing; None for one completion.
    """

    row: str
    kind: str
    question: str
    answer: str
    unanimous: bool | None


def group_answer(row: Row, texts: Sequence[str]) -> GroupAnswer:
    """Sum up a group. Formulas are compared by their text, which cannot take long and calls fewer groups unanimous.

    Raises `DataError` when answers have to be compared and the row's kind is unknown.
    """
    kind = _quick(row.kind)
    seconds = _both_answers(texts)[1]
    votes = _with_majority(seconds, seconds, kind)
    same = all(_same(seconds[0], second, kind) for second in seconds[1:]) if len(seconds) > 1 else None
    return GroupAnswer(
        row=row.id,
        kind=row.kind,
        question="\n".join((row.question, *row.options)),
        answer=seconds[int(np.argmax(votes))] if len(votes) and votes.max() > 0.0 else "",
        unanimous=same,
    )


class CollapseGuard:
    """Notices when rows without labels teach a model to say the same thing always.

    Three signs: every group of a window of steps was unanimous; the entropy, a mean over a window, is gone; nearly all
    of the last rows of a kind get one answer, though they ask more than one question or, all asking the same of
    different clips, once got different answers. (One answer from the beginning may be right.) A sign gives a warning
    when it first appears and stops the run when it stays for another window. Where it goes away and comes back, both
    begin again.
    """

    def __init__(
        self,
        window: int = 20,
        *,
        rows: int = 32,
        constant_share: float = 0.95,
        entropy_floor: float = 0.001,
        entropy_share: float = 0.1,
    ):
        """Set the bars.

        Args:
            window: steps with unlabelled groups.
            rows: so many different rows of a kind are looked at for one constant answer, each as it was last answered.
            constant_share: of them that have one answer is too much.
            entropy_floor: in nats a token; less is gone.
            entropy_share: of what the entropy was in the first steps; less is gone.

        Raises `ConfigError` when a bar makes no sense.
        """
        if window < 1 or rows < 2:
            raise ConfigError(f"a window of {window} steps and {rows} rows: expected at least 1 and 2")
        for name, share in (("constant_share", constant_share), ("entropy_share", entropy_share)):
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"{name} is {share}: expected a share from 0 to 1")
        if not 0.0 <= entropy_floor < math.inf:
            raise ConfigError(f"entropy_floor is {entropy_floor}: expected a number from 0 up")
        self._window, self._rows = window, rows
        self._constant_share, self._entropy_floor, self._entropy_share = constant_share, entropy_floor, entropy_share
        self._unanimous: deque[bool] = deque(maxlen=window)
        self._entropy: deque[float] = deque(maxlen=window)
        self._start: list[float] = []
        self._answers: dict[str, GroupAnswer] = {}  # by row, the last one answered at the end
        self._varied: set[str] = set()  # kinds whose rows got different answers
        self._held: dict[str, int] = {}  # sign -> for how many steps

    def observe(self, groups: Sequence[GroupAnswer], entropy: float | None = None) -> str | None:
        """Take in a step.

        Args:
            groups: its groups without labels, of all ranks; a step without any changes nothing.
            entropy: of its completions, in nats a token; None or not finite: unknown.

        Returns:
            A warning, one line, when a sign appears; else None.

        Raises `ConfigError` when a sign stays. Its window begins again then, for a run that goes on from here with
        other settings.
        """
        if not groups:
            return None
        judged = [group.unanimous for group in groups if group.unanimous is not None]
        if judged:
            self._unanimous.append(all(judged))
        if entropy is not None and math.isfinite(entropy):
            self._entropy.append(float(entropy))
            if len(self._start) < _START_STEPS:
                self._start.append(float(entropy))
        self._remember(groups)
        signs = {
            name: sign
            for name, sign in (
                ("unanimous", self._unanimity()),
                ("entropy", self._lost_entropy()),
                ("constant", self._constant_answer()),
            )
            if sign
        }
        self._held = {name: self._held.get(name, 0) + 1 for name in signs}
        lasting = [signs[name] for name, steps in self._held.items() if steps > self._window]
        if lasting:
            self._held = {}
            raise ConfigError(f"training without labels has collapsed: {'; '.join(lasting)}. To go on, {_ADVICE}")
        new = [signs[name] for name, steps in self._held.items() if steps == 1]
        if not new:
            return None
        return (
            f"training without labels may be collapsing: {'; '.join(new)}. "
            f"It stops if this lasts {self._window} more steps: {_ADVICE}"
        )

    def state(self) -> dict[str, Any]:
        """All that it has seen and still needs, as JSON can hold it."""
        return {
            "unanimous": list(self._unanimous),
            "entropy": list(self._entropy),
            "start": list(self._start),
            "answers": [asdict(group) for group in self._answers.values()],
            "varied": sorted(self._varied),
            "held": dict(self._held),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, with the bars of this guard; raises `ConfigError` when it is no such state."""
        try:
            unanimous = [bool(one) for one in state["unanimous"]]
            entropy = [float(one) for one in state["entropy"]]
            start = [float(one) for one in state["start"]]
            seen = [GroupAnswer(**one) for one in state["answers"]]
            varied = set(map(str, state.get("varied", ())))
            held = {str(name): int(steps) for name, steps in state["held"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"the guard's state is incomplete ({error!r}): start the run anew") from error
        self._unanimous, self._entropy = deque(unanimous, self._window), deque(entropy, self._window)
        self._start, self._held, self._varied, self._answers = start, held, varied, {}
        self._remember(seen)

    def _remember(self, groups: Sequence[GroupAnswer]) -> None:
        """Keep the last rows of each kind, in the order in which they were answered."""
        for group in groups:
            self._answers.pop(group.row, None)
            self._answers[group.row] = group
            of_kind = [row for row, other in self._answers.items() if other.kind == group.kind]
            if len(of_kind) > self._rows:
                del self._answers[of_kind[0]]

    def _unanimity(self) -> str | None:
        if len(self._unanimous) < self._window or not all(self._unanimous):
            return None
        return f"all groups of the last {self._window} steps are unanimous, so they are solved or teach nothing"

    def _lost_entropy(self) -> str | None:
        if len(self._entropy) < self._window:
            return None
        mean, start = math.fsum(self._entropy) / self._window, math.fsum(self._start) / len(self._start)
        if mean >= max(self._entropy_floor, self._entropy_share * start):
            return None
        return f"entropy is {mean:.2g} nats a token over the last {self._window} steps, {start:.2g} at the start"

    def _constant_answer(self) -> str | None:
        found = []
        for kind in sorted({group.kind for group in self._answers.values()}):
            groups = [group for group in self._answers.values() if group.kind == kind]
            if len(groups) < self._rows:
                continue
            answer, count = _most_common([group.answer for group in groups], _quick(kind))
            if not answer or count < self._constant_share * self._rows:
                self._varied.add(kind)
                continue
            asked = len({group.question for group in groups}) > 1
            if asked or kind in self._varied:
                shown = repr(answer if len(answer) <= 40 else f"{answer[:40]}..")
                told = f"{count} of the last {self._rows} rows of kind {kind} are answered {shown}"
                found.append(f"{told}, whatever {'is asked' if asked else 'the clip'}")
        return found[0] if found else None


def _both_answers(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """a1 and a2 of each completion, as the reward reads them."""
    pairs = [answers(text) for text in texts]
    return [first for first, _ in pairs], [second for _, second in pairs]


def _declines(said: str) -> bool:
    """Whether an answer is the sentence that declines, as the reward reads it: it does not even agree with itself."""
    return bool(said) and compare_answers(said, said) == 0.0


def _is_answer(said: str) -> bool:
    return bool(said) and not _declines(said)


def _agree(one: str, other: str, kind: str) -> float:
    """`rewards.agree`, whichever comes first: that a text is a formula is read from its second."""
    said, truth = sorted((one, other), key=lambda answer: ("$" in answer, answer))
    return compare_answers(said, truth, kind)


def _same(one: str, other: str, kind: str) -> bool:
    """Whether two answers, or two missing ones, are one to the guard."""
    return one == other or compare_answers(one, other, kind) >= _SAME


def _quick(kind: str) -> str:
    """The kind by which the guard compares."""
    return "exact_match" if kind == "math" else kind


def _with_majority(said: Sequence[str], seconds: Sequence[str], kind: str) -> np.ndarray:
    """How far each completion's answer agrees with the majority of the reviewed answers: (G,), see the module."""
    voters = [index for index, second in enumerate(seconds) if _is_answer(second)]
    if len(voters) < 2:
        return np.zeros(len(said))
    if kind in _GRADED:
        return np.array(
            [
                np.mean([_agree(one, seconds[voter], kind) for voter in voters if voter != index])
                for index, one in enumerate(said)
            ]
        )
    classes = _classes([seconds[voter] for voter in voters], kind)
    most = max(classes.values())
    if most < 2:
        return np.zeros(len(said))
    largest = [answer for answer, count in classes.items() if count == most]
    return np.array([np.mean([_agree(one, answer, kind) for answer in largest]) for one in said])


def _classes(said: Sequence[str], kind: str) -> dict[str, int]:
    """Answers that are equal, under the first of them, and how many there are."""
    found: dict[str, int] = {}
    for one in said:
        name = one if one in found else next((other for other in found if _agree(one, other, kind) == 1.0), one)
        found[name] = found.get(name, 0) + 1
    return found


def _most_common(said: Sequence[str], kind: str) -> tuple[str, int]:
    """The answer that most others are the same as, and how many are, itself included."""
    counts = [sum(_same(one, other, kind) for other in said) if one else 0 for one in said]
    best = int(np.argmax(counts))
    return said[best], counts[best]


def _find_reviewed(ids: list[int], tokenizer: ChatTokenizer) -> tuple[str, slice] | None:
    """The reviewed answer after a chain, and the tokens that are it."""
    text, spans = _read(ids, tokenizer)
    start = text.rfind(_END_THINK)
    answer = answers(text)[1]
    if start < 0 or not _is_answer(answer):
        return None
    box = re.compile(rf"{re.escape(_BOX)}\s*({re.escape(answer)})\s*\}}").search(text, start)
    assert box is not None, "the answer was read from a box"
    return answer, _tokens_of(answer, box.start(1), spans)


def _direct_logprobs(
    model: VideoModel, rollout: "Rollout", wanted: Sequence[str], temperature: float
) -> dict[str, float]:
    """The mean log-prob of each answer as the content of the first box."""
    texts = [f"{_BOX}{answer}}}" for answer in wanted]
    encoded = [model.tokenizer.encode(text, literal=(0, len(text))) for text in texts]
    packed = pack(rollout.prompt, [np.array(ids, dtype=np.int32) for ids in encoded])
    logprobs = np.array(completion_logprobs(model, packed, temperature=temperature), dtype=np.float64)
    means = {}
    for answer, ids, row in zip(wanted, encoded, logprobs):
        text, spans = _read(ids, model.tokenizer)
        content = text[len(_BOX) : -1]  # the answer as the tokenizer normalises it
        means[answer] = float(np.mean(row[_tokens_of(content, len(_BOX), spans)]))
    return means


def _read(ids: Sequence[int], tokenizer: ChatTokenizer) -> tuple[str, list[tuple[int, int]]]:
    """Text, and the characters [start, end) that each token covers."""
    detokenizer = Detokenizer(tokenizer.decode)
    text = "".join([detokenizer.push(token) for token in ids]) + detokenizer.flush()
    return text, detokenizer.spans


def _tokens_of(answer: str, offset: int, spans: Sequence[tuple[int, int]]) -> slice:
    """The tokens that overlap what counts of an answer that stands at `offset`."""
    start, stop = (offset + end for end in answer_span(answer))
    tokens = [token for token, (begin, end) in enumerate(spans) if begin < stop and end > start]
    return slice(tokens[0], tokens[-1] + 1)
