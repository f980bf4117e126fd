"""The callbacks by which long work reports progress to its caller and lets the caller stop it.

    progress(stage, done, total)    called as the work proceeds; stages are "download" and "check", "decoding",
                                    "vision", "prefill", and others that the function's docstring names
    should_stop() -> bool           called between steps; True ends the work with `mlxvr.Cancelled`

Both are called on the thread that does the work, and should return at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["NO_HOOKS", "Hooks", "Progress", "ShouldStop"]

Progress = Callable[[str, int, int], None]
ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class Hooks:
    """Both callbacks, for functions that pass them on; None: no progress is reported, or the work cannot be stopped.

    Attributes:
        progress: see above.
        should_stop: see above.
    """

    progress: Progress | None = None
    should_stop: ShouldStop | None = None


NO_HOOKS = Hooks()  # nobody listens, and nobody stops the work
