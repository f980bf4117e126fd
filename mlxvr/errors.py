"""The errors that mlxvr raises on purpose, in one tree.

    MlxvrError
    ├── MediaError          a video or an image cannot be read, or the requested range holds no frame
    ├── CheckpointError     a model folder is incomplete, damaged, unsupported or unsafe
    ├── RecipeError         a conversion recipe is wrong
    ├── DataError           a dataset row is wrong
    ├── ConfigError         an option has a value that cannot be used
    ├── OutOfMemoryError    the work cannot fit in the memory that is allowed
    ├── VerificationError   a converted model is too far from its source
    └── Cancelled           the caller asked for the work to stop

Every message is one line: what was found, what was expected, and what to do. The command line prints that line and
exits with 2, since the caller can put each of these right. Any other exception is a bug of mlxvr and exits with 1.
"""

from typing import Any

__all__ = [
    "Cancelled",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MediaError",
    "MlxvrError",
    "OutOfMemoryError",
    "RecipeError",
    "VerificationError",
]


class MlxvrError(Exception):
    """Base of every error that mlxvr raises on purpose."""


class MediaError(MlxvrError):
    """A video or an image cannot be read, or the requested range holds no frame."""


class CheckpointError(MlxvrError):
    """A model folder is incomplete, damaged, unsupported, or holds files that are never loaded (pickle)."""


class RecipeError(MlxvrError):
    """A conversion recipe has an unknown key or a value that cannot be used."""


class DataError(MlxvrError):
    """A dataset row is wrong; the message names the file and the line."""


class ConfigError(MlxvrError):
    """An option has a value that cannot be used."""


class OutOfMemoryError(MlxvrError):
    """The work does not fit in the memory that is allowed."""


class VerificationError(MlxvrError):
    """A converted model is further from its source than its recipe allows; `report` holds the measurements."""

    def __init__(self, message: str, report: Any = None):
        """`report`: a `mlxvr.conversion.measure.verify.VerificationReport`."""
        super().__init__(message)
        self.report = report


class Cancelled(MlxvrError):
    """The caller asked for the work to stop; the resources that it took have been released."""
