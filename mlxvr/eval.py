"""`python -m mlxvr.eval`: how accurate are direct, think and auto, what do they cost, which threshold is right.

The work is `mlxvr.evaluation.runner.evaluate`, which is also this module's `evaluate` for use from Python. The flags
are the fields of `EvalConfig`. stdout carries the figures, stderr the progress.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxvr.cli.parser import VerbParser, add_settings, parsed_settings, run_verb
from mlxvr.cli.progress import ProgressBar
from mlxvr.evaluation.eval_config import EvalConfig

if TYPE_CHECKING:
    from mlxvr.evaluation.runner import EvalReport, evaluate

__all__ = ["EvalConfig", "EvalReport", "evaluate", "main", "make_parser"]

_GROUPS = {
    "model": "which model",
    "data": "which questions",
    "frames": "which frames",
    "run": "how to ask",
    "figures": "which figures",
}
_MOST_NOTES = 5  # notes that are printed; the report has all


def __getattr__(name: str) -> Any:
    # MLX is not imported before the work begins, so that --help and wrong options answer at once.
    if name in ("EvalReport", "evaluate"):
        from mlxvr.evaluation import runner

        return getattr(runner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_parser() -> VerbParser:
    """The verb's options: one for each field of `EvalConfig`."""
    parser = VerbParser(
        "mlxvr eval",
        "Measure a model on clips with answers: directly, always thinking, and thinking when it is not sure.",
        epilog="A stopped run continues where it was: give the same --output.\n"
        "example: mlxvr eval --model videoauto-8b-4bit --data clips.jsonl --output report --calibrate no_loss",
    )
    add_settings(parser, EvalConfig, _GROUPS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit code."""
    return run_verb(make_parser(), _eval, argv)


def _eval(args: argparse.Namespace) -> None:
    config = EvalConfig(**parsed_settings(args, EvalConfig))
    from mlxvr.evaluation.console import table
    from mlxvr.evaluation.runner import evaluate

    with ProgressBar() as bar:
        report = evaluate(config, progress=bar)
    if report.rank:
        return
    for note in report.notes[:_MOST_NOTES]:
        print(f"left out: {note}", file=sys.stderr)
    if len(report.notes) > _MOST_NOTES:
        print(f"left out: {len(report.notes) - _MOST_NOTES} more, see the report", file=sys.stderr)
    for name, error in list(report.summary.errors.items())[:_MOST_NOTES]:
        print(f"failed: {name}: {error}", file=sys.stderr)
    print(json.dumps(report.to_dict(), ensure_ascii=False) if args.json else table(report))


if __name__ == "__main__":
    sys.exit(main())
