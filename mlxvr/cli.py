"""What every verb of the command line shares: one-line errors, exit codes, `--debug`.

A verb is a parser and a body. `run_verb` parses, calls the body and turns what happens into an exit code:

    0    done                                130  stopped with Ctrl-C
    2    the caller can put it right: a wrong option, or any `MlxvrError`
    1    anything else: a failure of ours or of the machine

Each failure is one line on stderr, `error: ...`; `--debug` adds the traceback. stdout is left to results.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from mlxvr.errors import MlxvrError

__all__ = ["VerbParser", "run_verb"]

Body = Callable[[argparse.Namespace], int | None]


class VerbParser(argparse.ArgumentParser):
    """argparse with flags spelled out in full, and a wrong option reported on one line without the usage."""

    def __init__(self, prog: str, description: str, *, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--debug", action="store_true", help="log more, and show tracebacks of errors")

    def error(self, message: str) -> NoReturn:
        """Print the mistake on one line and exit with 2."""
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


def run_verb(parser: VerbParser, body: Body, argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (None: the process's own arguments), run `body`, and return the exit code."""
    args = argparse.Namespace(debug=False)
    try:
        parser.parse_args(argv, args)
        level = logging.DEBUG if args.debug else logging.WARNING
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
        code = body(args) or 0
        sys.stdout.flush()
    except SystemExit as stop:  # argparse, or a body through `parser.error`, has printed what there is to say
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our stdout has gone; keep the interpreter's last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        known = isinstance(error, MlxvrError)
        print(f"error: {_one_line(error, known=known)}", file=sys.stderr)
        return 2 if known else 1
    return code


def _one_line(error: Exception, *, known: bool) -> str:
    """Fold a message onto one line; an unexpected error also names its type and points to `--debug`."""
    text = " ".join(str(error).split())
    if known:
        return text
    return f"{type(error).__name__}: {text} (add --debug for the traceback)"
