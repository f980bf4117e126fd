"""What every verb of the command line shares: one-line errors, exit codes, `--debug`.

A verb is a parser and a body. Its flags may be the fields of a dataclass (`add_settings`, see `mlxvr.cli.settings`).
`run_verb` parses, calls the body and turns what happens into an exit code:

    0    done                                130  stopped with Ctrl-C
    2    the caller can put it right: a wrong option, or any `MlxvrError`
    1    anything else: a failure of ours or of the machine

Each failure is one line on stderr, `error: ...`; `--debug` adds the traceback. stdout is left to results.
"""

import argparse
import dataclasses
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from mlxvr.cli.settings import Setting, settings_of
from mlxvr.errors import MlxvrError

__all__ = ["VerbParser", "add_settings", "clock_time", "parsed_settings", "run_verb"]

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


def add_settings(
    parser: VerbParser, config: type, groups: Mapping[str, str], *, sparse: bool = False
) -> dict[str, Any]:
    """Give a parser one flag for each field of a dataclass that has a group.

    Args:
        parser: of a verb.
        config: the dataclass; see `mlxvr.cli.settings.flag`.
        groups: titles of the help by the name of the group.
        sparse: leave flags that are absent out of the result of parsing instead of putting the default there, for
            verbs whose values also come from elsewhere; then switches can also be turned off (`--no-x`), and a field
            without default is not demanded.

    Returns the sections of the help by the name of the group, for flags beside the fields.
    """
    sections = {name: parser.add_argument_group(title) for name, title in groups.items()}
    for setting in settings_of(config).values():
        if "group" not in setting.options:  # it is no flag
            continue
        options = dict(setting.options)
        section = sections[options.pop("group")]
        if options.pop("spelling", None) is not None:
            options["dest"] = setting.name
        conversion = _conversion(setting, sparse, options)
        section.add_argument(setting.flag, **options, **conversion)
    return sections


def parsed_settings(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The values that parsing has for the fields of a dataclass."""
    return {name: getattr(args, name) for name in settings_of(config) if hasattr(args, name)}


def _conversion(setting: Setting, sparse: bool, options: dict[str, Any]) -> dict[str, Any]:
    """How argparse treats a setting; writes the default into its help."""
    missing = setting.default is dataclasses.MISSING
    shown = not missing and setting.default is not None and setting.default != () and setting.kind is not bool
    if shown:
        default = ",".join(setting.default) if setting.kind is tuple else setting.default
        options["help"] += f" (default: {default})"
    kind = options.pop("type", setting.from_text if setting.kind is tuple else setting.kind)
    if sparse:
        if setting.kind is bool:
            options["help"] += " (default: yes)" if setting.default else ""
            return {"action": argparse.BooleanOptionalAction, "default": argparse.SUPPRESS}
        return {"type": kind, "default": argparse.SUPPRESS}
    if setting.kind is bool:
        return {"action": "store_true"}
    return {"type": kind, **({"required": True} if missing else {"default": setting.default})}


def clock_time(text: str) -> float:
    """Seconds from seconds (`65`, `65.5`) or from a time of a player (`1:05`, `1:02:05.5`); for argparse."""
    parts = text.split(":")
    try:
        numbers = [float(part) if part.strip() == part else math.nan for part in parts]
    except ValueError:
        numbers = [math.nan]
    is_clock = len(parts) == 1 or all(0 <= number < 60 for number in numbers[1:])
    whole = all(number == int(number) for number in numbers[:-1] if math.isfinite(number))
    if not all(map(math.isfinite, numbers)) or len(parts) > 3 or not is_clock or not whole:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give seconds, such as 65.5, or a time such as 1:05")
    return math.fsum(number * 60**place for place, number in enumerate(reversed(numbers)))


def run_verb(parser: VerbParser, body: Body, argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (None: the process's own arguments), run `body`, and return the exit code."""
    args = argparse.Namespace(debug=False)
    try:
        parser.parse_args(argv, args)
        level = logging.DEBUG if args.debug else logging.WARNING
        form = "%(levelname)s %(name)s: %(message)s" if args.debug else "warning: %(message)s"
        logging.basicConfig(level=level, format=form)
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
