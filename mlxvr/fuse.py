"""`python -m mlxvr.fuse`: a model and the adapter that was trained on it become one model folder.

The work is `mlxvr.conversion.fusing.fuse`, which is also this module's `fuse` for use from Python.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxvr.cli.parser import VerbParser, add_settings, parsed_settings, run_verb
from mlxvr.cli.progress import ProgressBar
from mlxvr.conversion.conversion_options import FuseKeywords, FuseOptions
from mlxvr.conversion.summary import format_bytes, peak_memory

if TYPE_CHECKING:
    from mlxvr.conversion.fusing import fuse

__all__ = ["FuseKeywords", "fuse", "main", "make_parser"]


def __getattr__(name: str) -> Any:
    # MLX is not imported before the work begins, so that --help and wrong options answer at once.
    if name == "fuse":
        from mlxvr.conversion.fusing import fuse

        return fuse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_parser() -> VerbParser:
    """Return the command line's parser."""
    parser = VerbParser(
        "mlxvr fuse",
        "Merge a LoRA adapter into its model.",
        epilog="example: mlxvr fuse --model videoauto-8b-4bit --adapter run/adapter --mlx-path videoauto-8b-mine",
    )
    sections = add_settings(parser, FuseOptions, {"where": "what is merged", "result": "what becomes of the result"})
    sections["result"].add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_verb(make_parser(), _fuse, argv)


def _fuse(args: argparse.Namespace) -> None:
    from mlxvr.conversion.fusing import fuse_with

    options = FuseOptions(**parsed_settings(args, FuseOptions))
    with ProgressBar() as bar:
        report = fuse_with(
            options, progress=bar, on_tensor=lambda tensor: bar.note(f"{tensor}, peak {format_bytes(peak_memory())}")
        )
    print(json.dumps(report.to_dict()) if args.json else report.table())


if __name__ == "__main__":
    sys.exit(main())
