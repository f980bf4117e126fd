"""`mlxvr <verb> ...`: the same verbs as `python -m mlxvr.<verb>`."""

import sys
from collections.abc import Sequence
from importlib import import_module

VERBS = {
    "generate": "ask questions about a video",
    "convert": "convert a checkpoint to quantized MLX weights",
    "train": "fine-tune a model with LoRA and GRPO",
    "fuse": "merge a LoRA adapter into its model",
    "eval": "measure a model, and set its threshold by evidence",
    "doctor": "check that this install computes the right numbers here",
}


def usage() -> str:
    """The list of verbs."""
    rows = "\n".join(f"  {verb:<10} {what}" for verb, what in VERBS.items())
    return f"usage: mlxvr <verb> [options]\n\nverbs:\n{rows}\n\n`mlxvr <verb> --help` shows a verb's options.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments to the verb; returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] in VERBS:
        return int(import_module(f"mlxvr.{args[0]}").main(args[1:]))
    if args and args[0] in {"-h", "--help"}:
        sys.stdout.write(usage())
        return 0
    if args and args[0] == "--version":
        from mlxvr import __version__

        sys.stdout.write(f"mlxvr {__version__}\n")
        return 0
    problem = f"unknown verb {args[0]!r}" if args else "no verb given"
    sys.stderr.write(f"error: {problem}: use one of {', '.join(VERBS)} (see `mlxvr --help`)\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
