"""`python -m mlxvr.convert`: a checkpoint from the Hub or a folder becomes a folder of quantized MLX weights.

The work is `mlxvr.porting.quantize.convert`, which is also this module's `convert` for use from Python.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxvr.cli import VerbParser, run_verb
from mlxvr.porting.recipe import BITS, DTYPES, GROUP_SIZES

if TYPE_CHECKING:
    from mlxvr.porting.quantize import ConversionReport, convert

__all__ = ["ConversionReport", "convert", "main", "make_parser"]


def __getattr__(name: str) -> Any:
    # MLX is not imported before a conversion begins, so that --help and wrong options answer at once.
    if name in ("ConversionReport", "convert"):
        from mlxvr.porting import quantize

        return getattr(quantize, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_parser() -> VerbParser:
    """Return the command line's parser."""
    parser = VerbParser(
        "mlxvr.convert",
        "Convert a Qwen2.5-VL or Qwen3-VL checkpoint (VideoAuto-R1's among them) to quantized MLX weights.",
        epilog="example: mlxvr.convert --hf-path IVUL-KAUST/VideoAuto-R1-Qwen3-VL-8B --mlx-path videoauto-8b-4bit",
    )
    parser.add_argument("--hf-path", metavar="ID_OR_DIR", help="the checkpoint: a Hub id or a folder")
    parser.add_argument("--mlx-path", metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--recipe", metavar="NAME_OR_FILE", help="a recipe's name or TOML file (default: the checkpoint's own)"
    )
    parser.add_argument(
        "--q-bits", type=_bits, metavar="B", help=f"bits per weight: none, {_listed(BITS[1:])} (default: the recipe's)"
    )
    parser.add_argument(
        "--q-group-size", type=int, choices=GROUP_SIZES, metavar="G", help=f"weights per scale: {_listed(GROUP_SIZES)}"
    )
    parser.add_argument("--dtype", choices=DTYPES, metavar="T", help=f"of all that is not quantized: {_listed(DTYPES)}")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--force", action="store_true", help="replace a model folder that is in the way")
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
    from mlxvr.porting.quantize import convert

    with _Bars() as bars:
        report = convert(
            args.hf_path,
            args.mlx_path,
            recipe=args.recipe,
            bits=args.q_bits,
            group_size=args.q_group_size,
            dtype=args.dtype,
            revision=args.revision,
            force=args.force,
            progress=bars.show,
        )
    print(_as_json(report) if args.json else _as_table(report))


def _list_recipes() -> None:
    from mlxvr.porting import recipe

    for name in recipe.available():
        known = recipe.load(name)
        print(f"{name:28} {known.description} (threshold {known.threshold})")


def _bits(text: str) -> int:
    try:
        bits = 0 if text == "none" else int(text)
    except ValueError:
        bits = -1
    if bits not in BITS or text == "0":
        raise argparse.ArgumentTypeError(f"{text!r} is not one of none, {_listed(BITS[1:])}")
    return bits


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


class _Bars:
    """One progress bar over bytes on stderr for each stage; none where stderr is not a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, stage: str, done: int, total: int) -> None:
        """Move the stage's bar to `done` of `total` bytes."""
        from tqdm import tqdm

        if stage != self._stage:
            self.__exit__()
            self._bar = tqdm(
                desc=stage, total=total, unit="B", unit_scale=True, file=sys.stderr, disable=None, leave=False
            )
            self._stage = stage
        self._bar.total = total
        self._bar.update(done - self._bar.n)


def _as_table(report: "ConversionReport") -> str:
    weights = f"{report.bits} bits, groups of {report.group_size}" if report.bits else "not quantized"
    rows = [
        ("source", report.source + (f" at {report.commit[:12]}" if report.commit else "")),
        ("recipe", f"{report.recipe}, threshold {report.threshold}"),
        ("weights", f"{weights}, the rest {report.dtype}"),
        ("matrices", f"{report.quantized} quantized" + _indivisible(report)),
        ("size", f"{_gigabytes(report.bytes_before)} -> {_gigabytes(report.bytes_after)}"),
        ("bits per weight", f"{report.bits_per_weight:.2f}"),
        ("time", f"{report.seconds:.1f} s"),
        ("peak memory", _gigabytes(report.peak_memory)),
        ("written to", str(report.path)),
    ]
    return "\n".join(f"{name:16} {value}" for name, value in rows)


def _indivisible(report: "ConversionReport") -> str:
    count = len(report.indivisible)
    return f", {count} kept because groups of {report.group_size} do not divide their rows" if count else ""


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _as_json(report: "ConversionReport") -> str:
    import dataclasses

    values = {**dataclasses.asdict(report), "path": str(report.path), "bits_per_weight": report.bits_per_weight}
    return json.dumps(values)


if __name__ == "__main__":
    sys.exit(main())
