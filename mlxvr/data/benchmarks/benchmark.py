"""A benchmark that has been read, and the frame and token limits that it is evaluated with."""

from dataclasses import dataclass, field

from mlxvr.data.rows import Row

__all__ = ["COMMON_LIMITS", "Benchmark"]

# From arXiv 2601.05175 and its public scripts: limits that all benchmarks and models share. The numbers of frames and
# of video tokens differ between families (`Family.benchmark_limits`). The scripts spread frames over a video's frames,
# not over its time; the two differ where the rate varies.
COMMON_LIMITS: dict[str, int | float | str] = {
    "fps": 2.0,
    "sample_by": "index",
    "min_frames": 4,
    "frame_min_tokens": 16,
    "frame_max_tokens": 768,
    "image_min_tokens": 128,
    "image_max_tokens": 16_384,
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark's questions, and what its files lack.

    Attributes:
        name: its name for `read_benchmark`.
        rows: the questions whose videos exist, in the order of the files.
        limits: frame and token limits that all families share, values for `VisionSpec.with_overrides`.
        missing: the missing videos, as the files name them, each once, in the order of their first use.
        missing_rows: how many questions are about missing videos.
        skipped: "file:line: reason" of every question that cannot be asked or graded.
    """

    name: str
    rows: tuple[Row, ...]
    limits: dict[str, int | float | str] = field(default_factory=COMMON_LIMITS.copy)
    missing: tuple[str, ...] = ()
    missing_rows: int = 0
    skipped: tuple[str, ...] = field(default=(), repr=False)

    def describe(self) -> str:
        """Return one line for people: the number of questions, and of those that are missing."""
        parts = [f"{self.name}: {len(self.rows):,} questions"]
        if self.missing:
            shown = ", ".join(self.missing[:3]) + (", .." if len(self.missing) > 3 else "")
            videos = "video" if len(self.missing) == 1 else "videos"
            parts.append(f"{self.missing_rows:,} left out because of {len(self.missing):,} missing {videos} ({shown})")
        if self.skipped:
            parts.append(f"{len(self.skipped):,} cannot be used (the first: {self.skipped[0]})")
        return "; ".join(parts)

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for a report: the description, every missing video and every unusable question; () if all is there."""
        missing = (f"{video}: the video is missing" for video in self.missing)
        return (self.describe(), *missing, *self.skipped) if self.missing or self.skipped else ()
