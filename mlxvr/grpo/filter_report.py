"""What `--filter-only` did, for people and programs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["FilterReport"]


@dataclass(frozen=True, kw_only=True)
class FilterReport:
    """The result of filtering a dataset.

    Attributes:
        output: the file of the rows that were kept.
        progress: the log of what was sampled.
        media_root: the media root that `output` has to be read with; None: none.
        samples: completions per row.
        threshold: the score from which an answer was right.
        total: rows of the dataset; each is in one of the following counts.
        sometimes: rows that are sometimes right, and kept.
        never, always: rows that are never or always right, and dropped.
        unlabelled: rows without an answer, which cannot be judged and are kept.
        failed: why rows could not be sampled, one line each; they are left out, and the next run tries them again.
        sampled: rows that were sampled in this run; earlier runs sampled the others.
        left_out: rows of the data that could not be read; not counted in `total`.
    """

    output: Path
    progress: Path
    media_root: Path | None
    samples: int
    threshold: float
    total: int
    sometimes: int
    never: int
    always: int
    unlabelled: int
    failed: tuple[str, ...]
    sampled: int
    left_out: int = 0

    def describe(self) -> str:
        """One line for people."""
        parts = [
            f"{self.sometimes + self.unlabelled:,} of {self.total:,} rows kept in {self.output}",
            f"{self.never:,} dropped as never right and {self.always:,} as right {self.samples} times of "
            f"{self.samples}",
        ]
        if self.unlabelled:
            parts.append(f"{self.unlabelled:,} have no answer and were kept")
        if self.failed:
            parts.append(f"{len(self.failed):,} failed (the first: {self.failed[0]})")
        if self.left_out:
            parts.append(f"{self.left_out:,} rows of the data were left out")
        if self.media_root is not None:
            parts.append(f"its media paths need --media-root {self.media_root}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        paths = {
            name: None if path is None else str(path)
            for name, path in (("output", self.output), ("progress", self.progress), ("media_root", self.media_root))
        }
        return {**asdict(self), **paths, "failed": list(self.failed)}
