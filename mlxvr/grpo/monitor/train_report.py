"""What a training run did, for people and programs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["TrainReport"]


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a run did.

    Attributes:
        output: the folder, which is the adapter's.
        best: the folder of the best adapter; None without validation.
        best_step: the steps that it had been trained for.
        steps: that are done, of `total_steps`.
        stopped: whether it was asked to stop before the end; `resume` goes on.
        seconds: of this run.
        metrics: of the last step.
        valid: metrics on the validation rows by steps done.
        skipped: rows that could not be used when their turn came, by id, and why.
        left_out: rows of the data that could not be used from the start.
        reward: what judged: the name of the user's own function, or the paper's reward.
        warnings: what the run had to say.
        rank: of this process; only rank 0 writes.
    """

    output: Path
    best: Path | None
    best_step: int
    steps: int
    total_steps: int
    stopped: bool
    seconds: float
    metrics: Mapping[str, Any]
    valid: Mapping[int, Mapping[str, Any]]
    skipped: Mapping[str, str]
    left_out: int = 0
    reward: str = "the paper's reward"
    warnings: tuple[str, ...] = ()
    rank: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        best = None if self.best is None else str(self.best)
        return {**asdict(self), "output": str(self.output), "best": best, "warnings": list(self.warnings)}
