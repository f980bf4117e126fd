"""`python -m mlxvr.convert`: a checkpoint from the Hub or a folder becomes a folder of quantized MLX weights.

The work is `mlxvr.conversion.quantize.convert` and `mlxvr.conversion.measure.verify.verify`, which are also this
module's `convert` and `verify` for use from Python.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxvr.checkpoint.recipe import BITS, DTYPES, GROUP_SIZES, MODES
from mlxvr.cli.parser import VerbParser, run_verb
from mlxvr.cli.progress import ProgressBar
from mlxvr.conversion.summary import ConversionReport, format_bytes, peak_memory
from mlxvr.errors import VerificationError
from mlxvr.model.families.base import titles

if TYPE_CHECKING:
    from mlxvr.conversion.measure.verify import VerificationReport, verify
    from mlxvr.conversion.quantize import convert

__all__ = ["ConversionReport", "VerificationReport", "convert", "main", "make_parser", "verify"]


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
    parser.add_argument("--hf-path", metavar="ID_OR_DIR", help="the checkpoint: a Hub id or a folder")
    parser.add_argument("--mlx-path", metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--recipe", metavar="NAME_OR_FILE", help="a recipe's name or TOML file (default: the checkpoint's own)"
    )
    parser.add_argument(
        "--q-bits",
        type=_bits,
        metavar="B",
        help=f"bits per weight: none, {_listed(BITS[1:])}, or auto: what each module needs (default: the recipe's)",
    )
    parser.add_argument(
        "--target-gb", type=_size, metavar="N", help="with --q-bits auto: gigabytes of weights to fit in"
    )
    parser.add_argument(
        "--q-group-size", type=int, choices=GROUP_SIZES, metavar="G", help=f"weights per scale: {_listed(GROUP_SIZES)}"
    )
    parser.add_argument("--q-mode", choices=MODES, metavar="M", help=f"format of the weights: {_listed(MODES)}")
    parser.add_argument("--dequantize", action="store_true", help="unpack quantized MLX weights instead")
    parser.add_argument("--dtype", choices=DTYPES, metavar="T", help=f"of the unquantized tensors: {_listed(DTYPES)}")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--verify", action="store_true", help="compare the result with its source before it is kept")
    parser.add_argument("--upload-repo", metavar="ID", help="Hub repository to send the result to")
    parser.add_argument("--private", action="store_true", help="make that repository private if it is new")
    parser.add_argument(
        "--force", action="store_true", help="replace a model folder in the way; also keep a result that fails --verify"
    )
    parser.add_argument("--list-recipes", action="store_true", help="print the recipes that come along, and stop")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = make_parser()

    def body(args: argparse.Namespace) -> None:
        if args.list_recipes:
            _list_recipes()
            return
        missing = [f"--{name}" for name in ("hf-path", "mlx-path") if not getattr(args, name.replace("-", "_"))]
        if missing:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
        _convert(args)

    return run_verb(parser, body, argv)


def _convert(args: argparse.Namespace) -> None:
    from mlxvr.conversion.quantize import convert
    from mlxvr.conversion.upload import check_upload, upload

    if args.upload_repo:
        check_upload(args.upload_repo)  # before hours of work
    with ProgressBar() as bar:
        try:
            report = convert(
                args.hf_path,
                args.mlx_path,
                recipe=args.recipe,
                bits=args.q_bits,
                group_size=args.q_group_size,
                mode=args.q_mode,
                target_bytes=args.target_gb,
                dtype=args.dtype,
                dequantize=args.dequantize,
                revision=args.revision,
                verify=args.verify,
                title=args.upload_repo,
                force=args.force,
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


def _list_recipes() -> None:
    from mlxvr.checkpoint import recipe

    for name in recipe.available():
        known = recipe.load(name)
        print(f"{name:28} {known.description} (threshold {known.threshold})")


def _bits(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        bits = 0 if text == "none" else int(text)
    except ValueError:
        bits = -1
    if bits not in BITS or text == "0":
        raise argparse.ArgumentTypeError(f"{text!r} is not one of none, auto, {_listed(BITS[1:])}")
    return bits


def _size(text: str) -> int:
    """Gigabytes as bytes."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gigabytes above 0")
    return round(size * 1e9)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


if __name__ == "__main__":
    sys.exit(main())
