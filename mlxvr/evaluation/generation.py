"""Rows -> samples: each row is asked once, rows about the same clip one after another.

A clip is read and prefilled once for all its rows; a follow-up question computes what a fresh prompt would (see
`mlxvr.model.prefix`), so neither order nor grouping changes an answer. While the model works on one clip, the frames of
the next are read on another thread.

A row that fails does not stop the run; nor does a clip that cannot be read, though all its rows fail. The reason is in
`Sample.error`. An error other than an `MlxvrError` while the model answers is a bug of this package and ends the run. A
decoder may raise anything about a broken file, so every error while a clip is read is the clip's.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mlxvr.answering.events import Answer, FirstAnswer
from mlxvr.data.prefetch import read_ahead
from mlxvr.data.rows import Row
from mlxvr.errors import Cancelled, MlxvrError
from mlxvr.evaluation.samples import Sample
from mlxvr.grading.lenient import final_answer

if TYPE_CHECKING:
    from mlxvr.reasoner.clip import Clip
    from mlxvr.reasoner.reasoner import Reasoner

__all__ = ["Asking", "digest", "generate", "group_rows"]


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How rows are asked: "think" always reasons; "auto" stops early at the threshold."""

    mode: Literal["think", "auto"]
    threshold: float
    max_tokens: int


def group_rows(rows: Iterable[Row]) -> list[tuple[Row, ...]]:
    """Group rows that look at the same part of the same medium, in order of first rows; those without media are one."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.video or row.image, row.start, row.end, row.frames_fps), []).append(row)
    return [tuple(group) for group in groups.values()]


def digest(row: Row) -> str:
    """A hash that differs between rows that are asked differently; labels and what a report groups by are not in it."""
    parts = (row.kind, row.text, row.options, row.media, row.start, row.end, row.frames_fps, row.response_prefix)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def generate(reasoner: "Reasoner", groups: Sequence[tuple[Row, ...]], asking: Asking) -> Iterator[Sample]:
    """Ask every row; yield its sample as soon as it is answered."""
    with closing(read_ahead((rows[0] for rows in groups), reasoner.spec)) as clips:
        for rows, (vision, seconds) in zip(groups, clips):
            if isinstance(vision, Exception):
                yield from (_failed(row, vision) for row in rows)
                continue
            with reasoner.open(vision) as clip:
                for row in rows:
                    sample = _ask(reasoner, clip, row, asking, seconds)
                    if sample.error is None:
                        seconds = 0.0  # the first row that is answered has paid for the frames
                    yield sample


def _ask(reasoner: "Reasoner", clip: "Clip", row: Row, asking: Asking, media_seconds: float) -> Sample:
    reasoned = True
    try:
        events = clip.stream(
            row.text,
            options=row.options,
            kind=row.ask_kind,
            mode=asking.mode,
            threshold=asking.threshold,
            max_tokens=asking.max_tokens,
            response_prefix=row.response_prefix,
            options_may_repeat=True,
        )
        with closing(events):
            for event in events:
                if isinstance(event, FirstAnswer):
                    reasoned = event.reasons
    except Cancelled:
        raise
    except MlxvrError as error:
        return _failed(row, error)
    assert isinstance(event, Answer), "a stream ends with its Answer"
    text = event.second
    if text is None:
        text = final_answer(row.response_prefix + reasoner.detokenize(event.token_ids))
    usage = event.usage
    return _sample(
        row,
        first=event.first,
        confidence=event.confidence,
        second=event.second,
        reasoning=event.reasoning,
        text=text,
        first_tokens=usage.first_answer_tokens,
        total_tokens=usage.generated_tokens,
        prompt_tokens=usage.prompt_tokens,
        video_tokens=usage.video_tokens,
        first_seconds=usage.first_answer_seconds,
        total_seconds=usage.first_answer_seconds + usage.reasoning_seconds,
        prefill_seconds=usage.vision_seconds + usage.prefill_seconds,
        media_seconds=media_seconds,
        problems=event.problems,
        reasoned=reasoned,
    )


def _failed(row: Row, error: Exception) -> Sample:
    reason = " ".join(str(error).split())
    return _sample(row, error=reason if isinstance(error, MlxvrError) else f"{type(error).__name__}: {reason}")


def _sample(row: Row, **figures: Any) -> Sample:
    return Sample(
        id=row.id,
        kind=row.kind,
        task=row.task,
        category=row.category,
        pair=row.pair,
        question=row.question,
        options=row.options,
        answer=row.answer,
        media=row.media,
        start=row.start,
        end=row.end,
        asked=digest(row),
        **figures,
    )
