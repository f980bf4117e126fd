"""The rows of a report's gallery: the question, both answers, the reasoning, and four frames of the clip.

Frames are small JPEGs in the page itself. Each clip (a file with its time range) is decoded once, even if several
questions share it. The number of clips with frames is limited; clips with the most informative rows come first: rows
that changed from one run to the other, confident mistakes, rows where thinking changed the outcome. If a clip cannot be
read, the page shows the reason instead of frames; the report is written anyway.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mlxvr.answering.transcript import is_fallback
from mlxvr.data.option_letters import strip_letters
from mlxvr.errors import ConfigError, DataError, MediaError
from mlxvr.evaluation.graded_rows import GradedRow
from mlxvr.evaluation.samples import Sample
from mlxvr.grading.intervals import find_named_interval, segments_of
from mlxvr.grading.lenient import Grade, final_answer
from mlxvr.runtime.hooks import Progress
from mlxvr.storage.paths import list_frames

__all__ = ["ClipKey", "embed_frames", "gallery_rows", "read_thumbnails"]

_FRAMES = 4
_PIXELS = 30_000  # of a frame: about 230 x 130
_QUALITY = 72
_LONGEST = 6_000  # characters of a text that a page carries; samples.jsonl has all

ClipKey = tuple[str, float | None, float | None]  # media as given, start, end


def gallery_rows(
    rows: Sequence[GradedRow],
    rows_before: Mapping[str, GradedRow] | None = None,
    changes: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """A JSON-ready record for each row.

    Args:
        rows: of the run.
        rows_before: the same rows of the run to compare with, by id.
        changes: how rows changed from that run to this one, by id.
    """
    records = []
    for row in rows:
        own = (changes or {}).get(row.sample.id, ())
        record = _record(row) | {"interest": _interest(row, own)}
        if rows_before is not None:
            before = rows_before.get(row.sample.id)
            record["other"] = None if before is None or before.sample.error is not None else _answers(before)
            record["changes"] = list(own)
        records.append(record)
    return records


def embed_frames(
    rows: Sequence[GradedRow], records: Sequence[dict[str, Any]], *, media_root: Path | None, limit: int,
    progress: Progress | None = None,
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
    """Read the frames of up to `limit` clips and point each record at its clip's (`clip`: an index, or None).

    Returns the clips, each `{"frames": [{"seconds", "jpeg"}, ..], "note": why there are none}`, and how many clips
    were left out.
    """
    weights: dict[ClipKey, int] = {}
    for row, record in zip(rows, records):
        if row.sample.media:
            clip = _clip(row.sample)
            weights[clip] = min(weights.get(clip, record["interest"]), record["interest"])
    clips: list[dict[str, Any]] = []
    places: dict[ClipKey, int] = {}
    wanted, read = min(limit, len(weights)), 0
    for clip in sorted(weights, key=lambda clip: (weights[clip], str(clip))):
        if read == wanted:
            break
        if progress is not None:
            progress("frames", read, wanted)
        media, start, end = clip
        path = Path(media) if media_root is None else media_root / media
        places[clip] = len(clips)
        try:
            clips.append({"frames": read_thumbnails(path, start=start, end=end), "note": ""})
            read += 1
        except (MediaError, ConfigError, OSError) as error:  # does not count towards the limit
            clips.append({"frames": [], "note": str(error)})
    if progress is not None and wanted:
        progress("frames", wanted, wanted)
    for row, record in zip(rows, records):
        record["clip"] = places.get(_clip(row.sample)) if row.sample.media else None
    return clips, len(weights) - len(clips)


def read_thumbnails(path: Path, *, start: float | None = None, end: float | None = None) -> list[dict[str, Any]]:
    """Up to four frames of a video, evenly over its range, or one picture, as base64 JPEGs with their seconds.

    A folder of frames has no times. Raises `MediaError` when nothing can be read.
    """
    from PIL import Image

    from mlxvr.media import FrameSelection, VisionSpec, read_image, read_video
    from mlxvr.media.animation.animation_reader import is_animation, read_animation
    from mlxvr.media.container import check_file, is_image

    def jpeg(pixels: Any, seconds: float | None) -> dict[str, Any]:
        picture = Image.fromarray(pixels)
        scale = (_PIXELS / max(1, picture.width * picture.height)) ** 0.5
        if scale < 1:
            picture.thumbnail((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=_QUALITY, optimize=True)
        return {"seconds": seconds, "jpeg": base64.b64encode(out.getvalue()).decode()}

    if path.is_dir():
        pictures = list_frames(path)
        if not pictures:
            raise MediaError(f"{path} holds no jpg or png frames: unpack it again")
        last = len(pictures) - 1
        places = sorted({round(last * place / (_FRAMES - 1)) for place in range(_FRAMES)})
        return [jpeg(read_image(pictures[place]), None) for place in places]
    check_file(path)
    moves = is_image(path) and is_animation(path)
    if is_image(path) and not moves:
        return [jpeg(read_image(path), None)]
    spec = VisionSpec(
        patch_size=2,
        merge_size=1,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        fps=1e-6,  # so that the minimum number of frames is taken, or all frames of a shorter clip
        min_frames=_FRAMES,
        max_frames=_FRAMES,
        frame_min_tokens=16,
        frame_max_tokens=_PIXELS // 4,
    )
    frames = (read_animation if moves else read_video)(path, spec, FrameSelection(start=start, end=end))
    return [jpeg(pixels, round(float(at), 2)) for pixels, at in zip(frames.pixels, frames.seconds)]


def _record(row: GradedRow) -> dict[str, Any]:
    sample = row.sample
    options = strip_letters(sample.options)
    return {
        "id": sample.id,
        "task": sample.task,
        "category": sample.category,
        "pair": sample.pair,
        "kind": sample.kind,
        "question": _cut(sample.question),
        "options": options,
        "gold": _gold(sample),
        "gold_option": _gold_option(sample, options),
        "media": sample.media,
        "start": sample.start,
        "end": sample.end,
        "spans": _spans(sample),
        "problems": list(sample.problems),
        "error": sample.error,
        **_answers(row),
    }


def _answers(row: GradedRow) -> dict[str, Any]:
    """A run's answers to a row."""
    sample = row.sample
    return {
        "first": sample.first,
        "fallback": sample.first is not None and is_fallback(sample.first),
        "final": _cut(sample.final) if sample.reasoned else None,
        "reasoning": None if sample.reasoning is None else _cut(sample.reasoning),
        "confidence": sample.confidence,
        "reasoned": row.reasoned,
        "first_tokens": sample.first_tokens,
        "total_tokens": sample.total_tokens,
        "right": {name: _is_right(grade) for name, grade in _grades(row)},
        "score": {name: None if grade is None else round(grade.score, 4) for name, grade in _grades(row)},
    }


def _grades(row: GradedRow) -> list[tuple[str, Grade | None]]:
    return [("direct", row.direct), ("think", row.think), ("auto", row.auto)]


def _is_right(grade: Grade | None) -> bool | None:
    return None if grade is None else grade.is_right


def _gold(sample: Sample) -> str | None:
    """The ground truth in words; None without one."""
    if not sample.is_labelled:
        return None
    if sample.kind == "iou":
        return _segments(sample.answer)
    if sample.kind == "gqa" and not isinstance(sample.answer, str):
        answer, segments = sample.answer  # type: ignore[misc]
        return f"{answer}, {_segments(segments)}"
    return ", ".join(map(str, sample.answer)) if isinstance(sample.answer, list) else str(sample.answer)


def _segments(answer: Any) -> str:
    return ", ".join(f"{start:g} to {end:g} s" for start, end in segments_of(answer))


def _gold_option(sample: Sample, options: Sequence[str]) -> int | None:
    """The index of the right option, if the ground truth names an option by letter or by text."""
    answer = sample.answer[0] if sample.kind == "gqa" and isinstance(sample.answer, list) else sample.answer
    if not isinstance(answer, str) or not options:
        return None
    named = answer.partition("<>")[0].strip()
    letter = named.strip("().: ").upper()
    if len(letter) == 1 and letter in ascii_uppercase[: len(options)]:
        return ascii_uppercase.index(letter)
    same = [index for index, option in enumerate(options) if option.strip().casefold() == named.casefold()]
    return same[0] if len(same) == 1 else None


def _spans(sample: Sample) -> dict[str, Any] | None:
    """The intervals of a grounded row, in seconds: the true ones and those of both answers."""
    if sample.kind not in ("iou", "gqa"):
        return None
    gold: list[tuple[float, float]] = []
    if sample.is_labelled:
        truth = sample.answer[1] if sample.kind == "gqa" and isinstance(sample.answer, list) else sample.answer
        try:
            gold = segments_of(truth.partition("<>")[2] if sample.kind == "gqa" and isinstance(truth, str) else truth)
        except DataError:
            gold = []
    first = find_named_interval(final_answer(sample.first or "").rpartition("<>")[2])
    final = find_named_interval(final_answer(sample.final).rpartition("<>")[2]) if sample.reasoned else None
    return {"gold": gold, "first": first, "final": final}


def _interest(row: GradedRow, changes: Sequence[str]) -> int:
    """How informative a row is, 0 the most: it decides the gallery's order, and whose frames are in the page."""
    direct, think, auto = (_is_right(grade) for _, grade in _grades(row))
    signs = (
        "became_wrong" in changes,
        "became_right" in changes,
        auto is False and not row.reasoned,
        think is not None and direct != think,
        auto is False,
        bool(changes),
    )
    return signs.index(True) if any(signs) else len(signs)


def _clip(sample: Sample) -> ClipKey:
    return sample.media, sample.start, sample.end


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … (cut; samples.jsonl has all of it)"
