"""Findings of checks, and their status.

green     as on the machines that we test on
yellow    works, but slower, less exactly or less completely than on the machines that we test on
red       wrong numbers, or does not work: do not trust answers of this install
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Finding", "Status", "judge", "worst"]

Status = Literal["green", "yellow", "red"]

_ORDER: tuple[Status, ...] = ("green", "yellow", "red")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        check: name of the check.
        status: see above.
        text: the finding in words.
        measured: the measured number; None: there is none.
        limit: the largest number that is green; None: there is none.
        advice: what to do if it is not green.
    """

    check: str
    status: Status
    text: str
    measured: float | None = None
    limit: float | None = None
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def judge(check: str, error: float, *, green: float, red: float, what: str, advice: str) -> Finding:
    """The finding about a measured error.

    Args:
        check: name of the check.
        error: the measured error; NaN is red.
        green: the largest expected error.
        red: the smallest error that counts as wrong; between the two, the finding is yellow.
        what: the kind of error, such as "relative error of the logits".
        advice: what to do if the error is not green.
    """
    status: Status = "green" if error <= green else "yellow" if error < red else "red"
    exceeds = "" if status == "green" else f", expected at most {green:.1g}"
    number = f"{error:.1e}" if math.isfinite(error) else str(error)
    return Finding(
        check=check,
        status=status,
        text=f"{what} {number}{exceeds}",
        measured=float(error) if math.isfinite(error) else None,
        limit=green,
        advice="" if status == "green" else advice,
    )


def worst(findings: Sequence[Finding]) -> Status:
    """The worst status among findings; green without findings."""
    return max((finding.status for finding in findings), key=_ORDER.index, default="green")
