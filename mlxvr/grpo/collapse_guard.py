"""A guard against collapse: rows without labels can teach a model to always say the same.

Three signs are watched:

    unanimity         every group of a window of steps was unanimous
    lost entropy      the mean entropy of a window fell below a floor, or below a share of what it was at the start
    constant answer   nearly all of the last rows of a kind get the same answer, though they ask different questions;
                      or they ask the same question about different clips, and once got different answers (the same
                      answer from the beginning may be right)

A sign gives a warning when it appears, and stops the run when it lasts for another window. If it disappears and
returns, both begin again.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlxvr.data.rows import Row
from mlxvr.errors import ConfigError
from mlxvr.grpo.step.majority import both_answers, is_same, majority_agreement, most_common, text_kind

__all__ = ["CollapseGuard", "GroupAnswer", "summarise_answers"]

_START_STEPS = 5  # their mean entropy is that of the start
_ADVICE = "raise --beta, lower --learning-rate or add labelled rows"


@dataclass(frozen=True, kw_only=True)
class GroupAnswer:
    """What a group without a label answers, as far as the guard needs it; JSON-ready, so that ranks can exchange it.

    Attributes:
        row: the row's id.
        kind: the row's kind.
        question: the question with its options.
        answer: a reviewed answer of the majority; "" without a majority.
        unanimous: whether all reviewed answers are the same, or all are missing; None for a single completion.
    """

    row: str
    kind: str
    question: str
    answer: str
    unanimous: bool | None


def summarise_answers(row: Row, texts: Sequence[str]) -> GroupAnswer:
    """Summarise the completions of a row for the guard.

    Formulas are compared by their text, which cannot take long and calls fewer groups unanimous.

    Raises `DataError` when answers have to be compared and the row's kind is unknown.
    """
    kind = text_kind(row.kind)
    reviewed = both_answers(texts)[1]
    votes = majority_agreement(reviewed, reviewed, kind)
    unanimous = all(is_same(reviewed[0], answer, kind) for answer in reviewed[1:]) if len(reviewed) > 1 else None
    return GroupAnswer(
        row=row.id,
        kind=row.kind,
        question="\n".join((row.question, *row.options)),
        answer=reviewed[int(np.argmax(votes))] if len(votes) and votes.max() > 0.0 else "",
        unanimous=unanimous,
    )


class CollapseGuard:
    """Watches the groups without labels for the signs above."""

    def __init__(
        self,
        window: int = 20,
        *,
        rows: int = 32,
        constant_share: float = 0.95,
        entropy_floor: float = 0.001,
        entropy_share: float = 0.1,
    ):
        """Set the limits.

        Args:
            window: steps with unlabelled groups.
            rows: how many of the last rows of a kind are compared, each by its latest answer.
            constant_share: share of those rows that may not have the same answer.
            entropy_floor: nats per token below which entropy is lost.
            entropy_share: share of the entropy of the first steps below which entropy is lost.

        Raises `ConfigError` when a limit makes no sense.
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
        self._answers: dict[str, GroupAnswer] = {}  # by row, in the order in which they were last answered
        self._varied: set[str] = set()  # kinds whose rows got different answers
        self._held: dict[str, int] = {}  # sign -> for how many steps

    def observe(self, groups: Sequence[GroupAnswer], entropy: float | None = None) -> str | None:
        """Take in a step.

        Args:
            groups: its groups without labels, of all ranks; a step without any changes nothing.
            entropy: of its completions, in nats per token; None or not finite: unknown.

        Returns:
            A warning, one line, when a sign appears; else None.

        Raises `ConfigError` when a sign lasts. Its window then begins again, for a run that is resumed from here with
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
            raise ConfigError(f"training without labels has collapsed: {'; '.join(lasting)}. To continue, {_ADVICE}")
        new = [signs[name] for name, steps in self._held.items() if steps == 1]
        if not new:
            return None
        return (
            f"training without labels may be collapsing: {'; '.join(new)}. "
            f"It stops if this lasts {self._window} more steps: {_ADVICE}"
        )

    def state(self) -> dict[str, Any]:
        """Everything it has seen and still needs, JSON-ready."""
        return {
            "unanimous": list(self._unanimous),
            "entropy": list(self._entropy),
            "start": list(self._start),
            "answers": [asdict(group) for group in self._answers.values()],
            "varied": sorted(self._varied),
            "held": dict(self._held),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`, with the limits of this guard; raises `ConfigError` when it is no such state."""
        try:
            unanimous = [bool(value) for value in state["unanimous"]]
            entropy = [float(value) for value in state["entropy"]]
            start = [float(value) for value in state["start"]]
            groups = [GroupAnswer(**group) for group in state["answers"]]
            varied = set(map(str, state.get("varied", ())))
            held = {str(name): int(steps) for name, steps in state["held"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"the guard's state is incomplete ({error!r}): start the run anew") from error
        self._unanimous, self._entropy = deque(unanimous, self._window), deque(entropy, self._window)
        self._start, self._held, self._varied, self._answers = start, held, varied, {}
        self._remember(groups)

    def _remember(self, groups: Sequence[GroupAnswer]) -> None:
        """Keep the last rows of each kind, in the order in which they were answered."""
        for group in groups:
            self._answers.pop(group.row, None)
            self._answers[group.row] = group
            same_kind = [row for row, known in self._answers.items() if known.kind == group.kind]
            if len(same_kind) > self._rows:
                del self._answers[same_kind[0]]

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
        signs = []
        for kind in sorted({group.kind for group in self._answers.values()}):
            groups = [group for group in self._answers.values() if group.kind == kind]
            if len(groups) < self._rows:
                continue
            answer, count = most_common([group.answer for group in groups], text_kind(kind))
            if not answer or count < self._constant_share * self._rows:
                self._varied.add(kind)
                continue
            questions_differ = len({group.question for group in groups}) > 1
            if questions_differ or kind in self._varied:
                shown = repr(answer if len(answer) <= 40 else f"{answer[:40]}..")
                signs.append(
                    f"{count} of the last {self._rows} rows of kind {kind} are answered {shown}, whatever "
                    f"{'is asked' if questions_differ else 'the clip'}"
                )
        return signs[0] if signs else None
