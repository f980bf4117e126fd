"""`python -m mlxvr.doctor`: check that this install computes the right numbers on this machine, and how fast it is.

It compares MLX's results with numbers that transformers computed on another machine, tries out what apps rely on, and
predicts the cost of a question. Nothing leaves the machine; the output can be pasted into an issue.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from mlxvr import __version__
from mlxvr.cli.parser import VerbParser, run_verb

if TYPE_CHECKING:
    import argparse

    from mlxvr.diagnosis.findings import Finding, Status

__all__ = ["main", "make_parser"]

_COLORS = {"green": "32", "yellow": "33", "red": "31"}


def make_parser() -> VerbParser:
    """Return the command line's parser."""
    parser = VerbParser(
        "mlxvr doctor",
        "Check that this install computes the right numbers on this machine, and predict how fast an 8B model is.",
        epilog="exit code: 0 all green or yellow, 1 anything red. Nothing leaves the machine.",
    )
    parser.add_argument("--no-speed", action="store_true", help="skip the measurement of speed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_verb(make_parser(), _diagnose, argv)


def _diagnose(args: "argparse.Namespace") -> int:
    from mlxvr.diagnosis.checks import CHECKS, SPEED
    from mlxvr.diagnosis.findings import worst
    from mlxvr.diagnosis.supervisor import run_checks

    names = [name for name in CHECKS if not (args.no_speed and name == SPEED)]
    started = time.perf_counter()
    findings = []
    if not args.json:
        print(f"mlxvr {__version__} on Python {platform.python_version()}, {platform.platform()}", flush=True)
    for finding in run_checks(names):
        findings.append(finding)
        if not args.json:
            _print(finding, sys.stdout)
    status = worst(findings)
    seconds = time.perf_counter() - started
    if args.json:
        report = {
            "version": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "status": status,
            "seconds": round(seconds, 1),
            "findings": [finding.to_dict() for finding in findings],
        }
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(_verdict(findings, status, seconds))
    return 1 if status == "red" else 0


def _print(finding: "Finding", out: TextIO) -> None:
    """Print the finding, and its advice on a second line."""
    label = f"{finding.status:<6}"
    if out.isatty() and "NO_COLOR" not in os.environ:
        label = f"\033[{_COLORS[finding.status]}m{label}\033[0m"
    print(f"{label}  {finding.check}: {finding.text}", file=out)
    if finding.advice:
        print(f"        {finding.advice}", file=out)
    out.flush()


def _verdict(findings: "Sequence[Finding]", status: "Status", seconds: float) -> str:
    count = {name: sum(finding.status == name for finding in findings) for name in _COLORS}
    words = {
        "green": "all is as on the machines that we test on",
        "yellow": "it works; the lines above name what is slower or less exact than on the machines that we test on",
        "red": "something is wrong here: do not trust answers of this install until it is mended",
    }
    counted = ", ".join(f"{number} {name}" for name, number in count.items() if number)
    return f"{counted} in {seconds:.0f} s: {words[status]}"


if __name__ == "__main__":
    sys.exit(main())
