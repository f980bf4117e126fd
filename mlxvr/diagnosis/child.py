"""The process that runs checks: `python -m mlxvr.diagnosis.child NAME ..`, one JSON object a line on stdout.

    {"begin": "logits"}    {"finding": {..}}    {"end": "logits"}

An error within a check is a red finding, and the next check runs. A check's prints go to stderr.
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from mlxvr.diagnosis.checks import find
from mlxvr.diagnosis.findings import Finding

__all__ = ["main"]


def main(names: Sequence[str], out: TextIO) -> None:
    """Run checks by name and write their findings."""

    def write(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    for name in names:
        write({"begin": name})
        try:
            for finding in find(name)():
                write({"finding": finding.to_dict()})
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            advice = "this does not work here: please report it with this output"
            write({"finding": Finding(check=name, status="red", text=text, advice=advice).to_dict()})
        write({"end": name})


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints of libraries, from Python or C, must not mix with results
    with contextlib.closing(pipe):
        main(sys.argv[1:], pipe)
