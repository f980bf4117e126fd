"""How long the prompts of a dataset are, before anything is trained.

Media are measured by the headers of their files, so that a prompt takes milliseconds. All rows are measured if time
allows. Rows that are likely to be the longest come first: in turn the row with the largest file and the row with the
longest text. So a mix that begins with questions about text is not mistaken for a dataset of text.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from mlxvr.data.media_size import outline_row
from mlxvr.data.prefetch import load_row
from mlxvr.data.rows import Row
from mlxvr.errors import Cancelled, DataError, MediaError
from mlxvr.grpo.step.prompts import refuse_length, write_prompt
from mlxvr.media.patches import VisionInput
from mlxvr.media.spec import VisionSpec
from mlxvr.model.network import VideoModel
from mlxvr.runtime.hooks import ShouldStop
from mlxvr.storage.paths import list_frames

__all__ = ["PromptLengths", "first_too_long", "measure_prompts"]

_SECONDS = 10.0
_READ_AGAIN = 4  # how many seemingly too long prompts are decoded to be sure before a run is refused


@dataclass(frozen=True, kw_only=True)
class PromptLengths:
    """The measured lengths of prompts, in tokens.

    Attributes:
        longest: tokens of the longest prompt.
        visual: the most visual tokens of a prompt.
        frame: the most visual tokens of a temporal patch of a clip.
        measured: number of rows whose prompts were measured.
        total: number of all rows.
        too_long: the rows whose prompts are longer than allowed, in the order of the data, each with its message.
    """

    longest: int
    visual: int
    frame: int
    measured: int
    total: int
    too_long: tuple[tuple[Row, str], ...] = ()

    def describe(self) -> str:
        """One line for people."""
        which = "all" if self.measured == self.total else f"{self.measured:,} of"
        return f"prompts of up to {self.longest:,} tokens, {self.visual:,} visual, in {which} {self.total:,} rows"


def measure_prompts(
    model: VideoModel,
    rows: Sequence[Row],
    spec: VisionSpec,
    *,
    max_prompt_tokens: int,
    seconds: float = _SECONDS,
    should_stop: ShouldStop | None = None,
) -> PromptLengths:
    """Measure the prompts of rows, the likely longest first, for as long as the time lasts.

    Args:
        model: whose tokenizer and chat template write them.
        rows: of a dataset.
        spec: how frames are sampled and sized.
        max_prompt_tokens: longer prompts are `too_long`.
        seconds: time limit; at least one row is measured.
        should_stop: asked between rows.

    A row that cannot be read is passed over; training on it reports why. Raises `Cancelled` when `should_stop` says so.
    """
    ends = time.monotonic() + seconds
    longest, visual, frame, measured = 1, 0, 0, 0
    too_long: list[tuple[int, str]] = []
    seen: dict[object, VisionInput | None] = {}
    for index in _likely_longest(rows):
        if measured and time.monotonic() > ends:
            break
        if should_stop is not None and should_stop():
            raise Cancelled("stopped while prompts were measured")
        row = rows[index]
        measured += 1
        try:
            key = (row.video, row.image, row.start, row.end, row.frames_fps)
            if key not in seen:
                seen[key] = outline_row(row, spec)
            prompt = write_prompt(model, row, seen[key])
        except (DataError, MediaError):
            continue
        tokens, pictured = len(prompt.ids), int(prompt.media_mask.sum())
        if tokens > max_prompt_tokens:
            too_long.append((index, refuse_length(row, tokens, pictured, max_prompt_tokens)))
            tokens, pictured = max_prompt_tokens, min(pictured, max_prompt_tokens)
        vision = seen[key]
        longest, visual = max(longest, tokens), max(visual, pictured)
        frame = max(frame, pictured // max(1, 0 if vision is None else vision.grid[0]))
    return PromptLengths(
        longest=longest,
        visual=visual,
        frame=frame,
        measured=measured,
        total=len(rows),
        too_long=tuple((rows[index], reason) for index, reason in sorted(too_long)),
    )


def first_too_long(
    model: VideoModel, lengths: PromptLengths, spec: VisionSpec, *, max_prompt_tokens: int
) -> str | None:
    """The message for the first row whose prompt is too long, checked on decoded frames; None: no row is too long."""
    for row, reason in lengths.too_long[:_READ_AGAIN]:
        try:
            if len(write_prompt(model, row, load_row(row, spec)).ids) > max_prompt_tokens:
                return reason
        except (DataError, MediaError):
            continue
    return None


def _likely_longest(rows: Sequence[Row]) -> Iterator[int]:
    """The indices of all rows: alternately by the size of the file and by the length of the text, longest first."""
    everything = range(len(rows))
    by_file = sorted(everything, key=lambda index: -_file_size(rows[index]))
    by_text = sorted(everything, key=lambda index: -len(rows[index].text) - sum(map(len, rows[index].options)))
    seen = set()
    for index in chain.from_iterable(zip_longest(by_file, by_text)):
        if index not in seen:
            seen.add(index)
            yield index


def _file_size(row: Row) -> int:
    """Bytes of what a row shows; of a folder of frames as if each took 100 kB; 0 where there is nothing."""
    path = row.video or row.image
    if path is None:
        return 0
    try:
        return len(list_frames(path)) * 100_000 if path.is_dir() else path.stat().st_size
    except OSError:
        return 0
