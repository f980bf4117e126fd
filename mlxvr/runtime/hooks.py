"""What long work tells its caller, and asks of it.

    progress(stage, done, total)    called as the work gets on; stages are "download" and "check", "decoding", "vision",
                                    "prefill", and others that the function names
    should_stop() -> bool           asked between steps; True ends the work with `mlxvr.Cancelled`

Both are called on the thread that does the work, and should return at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Hooks", "Progress", "ShouldStop"]

Progress = Callable[[str, int, int], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class Hooks:
    """Both, for functions that pass them on; None: nobody listens, and nobody stops the work.

    Attributes:
        progress: see above.
        should_stop: see above.
    """

    progress: Progress | None = None
    should_stop: ShouldStop | None = None
