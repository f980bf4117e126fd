"""What a check found, and how bad that is.

green     as on the machines that we test on
yellow    works, but slower, less exact or less than where we test
red       wrong numbers, or it does not work: do not trust answers of this install
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
        check: what was looked at.
        status: see above.
        text: what was found, in words.
        measured: the number behind it; None where there is none.
        limit: up to which the number is green; None where there is none.
        advice: what to do where it is not green.
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
    """A finding about an error.

    Args:
        check: its name.
        error: what was measured; NaN is as bad as can be.
        green: the largest error that is expected.
        red: the error from which numbers count as wrong; between the two they are yellow.
        what: of what the error is, such as "relative error of the logits".
        advice: what to do where the error is not green.
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
    """The worst status among findings; green where there are none."""
    return max((finding.status for finding in findings), key=_ORDER.index, default="green")
