"""`python -m mlxvr.convert`: a checkpoint from the Hub or a folder becomes a folder of quantized MLX weights.

The work is `mlxvr.conversion.quantize.convert` and `mlxvr.conversion.measure.verify.verify`, which are also this
module's `convert` and `verify` for use from Python.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxvr.cli.parser import VerbParser, add_settings, parsed_settings, run_verb
from mlxvr.cli.progress import ProgressBar
from mlxvr.conversion.conversion_options import ConvertKeywords, ConvertOptions
from mlxvr.conversion.summary import ConversionReport, format_bytes, peak_memory
from mlxvr.errors import VerificationError
from mlxvr.model.families.base import titles

if TYPE_CHECKING:
    from mlxvr.conversion.measure.verify import VerificationReport, verify
    from mlxvr.conversion.quantize import convert

__all__ = ["ConversionReport", "ConvertKeywords", "VerificationReport", "convert", "main", "make_parser", "verify"]


def __getattr__(name: str) -> Any:
    # MLX is not imported before a conversion begins, so that --help and wrong options answer at once.
    if name == "convert":
        from mlxvr.conversion.quantize import convert

        return convert
    if name in ("VerificationReport", "verify"):
        from mlxvr.conversion.measure import verify

        return getattr(verify, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_parser() -> VerbParser:
    """Return the command line's parser."""
    parser = VerbParser(
        "mlxvr convert",
        f"Convert a {titles(' or ')} checkpoint (VideoAuto-R1's among them) to quantized MLX weights.",
        epilog="example: mlxvr convert --hf-path IVUL-KAUST/VideoAuto-R1-Qwen3-VL-8B --mlx-path videoauto-8b-4bit",
    )
    groups = {
        "where": "from where to where",
        "weights": "how the weights are stored (defaults come from the recipe)",
        "result": "what becomes of the result",
    }
    sections = add_settings(parser, ConvertOptions, groups)
    sections["weights"].add_argument(
        "--list-recipes", action=_ListRecipes, nargs=0, help="print the recipes that come along, and stop"
    )
    result = sections["result"]
    result.add_argument("--upload-repo", metavar="ID", help="Hub repository to send the result to")
    result.add_argument("--private", action="store_true", help="make that repository private if it is new")
    result.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_verb(make_parser(), _convert, argv)


def _convert(args: argparse.Namespace) -> None:
    from mlxvr.conversion.quantize import convert_with
    from mlxvr.conversion.upload import check_upload, upload

    options = ConvertOptions(**parsed_settings(args, ConvertOptions), title=args.upload_repo)
    if args.upload_repo:
        check_upload(args.upload_repo)  # before hours of work
    with ProgressBar() as bar:
        try:
            report = convert_with(
                options,
                progress=bar,
                on_tensor=lambda tensor: bar.note(f"{tensor}, peak {format_bytes(peak_memory())}"),
            )
        except VerificationError as error:
            bar.clear()
            print(error.report.table(), file=sys.stderr)
            raise
    uploaded = None
    if args.upload_repo:
        uploaded = upload(report.path, args.upload_repo, private=args.private)  # the Hub's client draws its own bars
    if args.json:
        print(json.dumps({**report.to_dict(), "uploaded": uploaded}))
        return
    print(report.table())
    if uploaded is not None:
        print(f"\nuploaded to {uploaded}")


class _ListRecipes(argparse.Action):
    """Prints the recipes and ends, as `--help` does."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from mlxvr.checkpoint import recipe

        for name in recipe.available():
            known = recipe.load(name)
            print(f"{name:28} {known.description} (threshold {known.threshold})")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
