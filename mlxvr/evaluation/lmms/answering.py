"""lmms-eval's questions -> answers; knows lmms-eval's shapes, but needs none of its code.

Questions in a row that look at the same files share one clip, so the video is read and prefilled once for all of them.
lmms-eval keeps the order of the data set, and benchmarks list the questions about a video together.

A question that fails (a damaged video, a prompt that is too long) is answered with the empty text, which counts as
wrong and which lmms-eval's cache does not keep, so that a later run asks it again; the reason is logged.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mlxvr.answering.events import Answer
from mlxvr.answering.loop import AskKeywords, Kind, Mode
from mlxvr.data.row_fields import GradingKind
from mlxvr.errors import Cancelled, ConfigError, MediaError, MlxvrError
from mlxvr.evaluation.lmms.options import LmmsOptions
from mlxvr.evaluation.samples import Sample, SampleWriter
from mlxvr.media.frame_options import FrameOptions
from mlxvr.model.prompt import KINDS, question_text
from mlxvr.storage.paths import PICTURE_SUFFIXES

if TYPE_CHECKING:
    from mlxvr.reasoner.clip import Clip
    from mlxvr.reasoner.reasoner import Reasoner

__all__ = ["LmmsRequest", "Response", "answer_all", "open_log", "read_context", "read_visuals"]

_log = logging.getLogger(__name__)

_PLACEHOLDER = re.compile(r"<(?:image|video)>[ \n]?")
_SAMPLE_BY = "index"  # as the public evaluation spreads frames, also where a video's rate varies
_WHERE = {"model", "adapter", "revision", "log_file"}  # the model's identity says what these lead to
_MEMORY = {"prefill_step_size", "memory_limit"}  # they change no answer
_GRADED_AS: dict[Kind, GradingKind] = {"qa": "exact_match", "grounding": "iou", "grounded_qa": "gqa"}


@dataclass(frozen=True, kw_only=True)
class LmmsRequest:
    """One request of lmms-eval.

    Attributes:
        task, split, doc_id: where the question is from.
        context: the task's prompt.
        visuals: returns the media, see `read_visuals`.
        generation: the task's generation settings, of which only temperature, top-p and `do_sample` count.
    """

    task: str
    split: str
    doc_id: int | str
    context: str
    visuals: Callable[[], Any]
    generation: Mapping[str, Any]


@dataclass(frozen=True)
class Response:
    """What lmms-eval gets to grade; `answer` is None and `error` says why where the question failed."""

    text: str
    answer: Answer | None = None
    error: str | None = None


def answer_all(
    reasoner: "Reasoner", requests: Iterable[LmmsRequest], options: LmmsOptions, *, log: SampleWriter | None = None
) -> Iterator[Response]:
    """Answer requests in their order; each response is yielded before the next request is read.

    Logs how many could not be answered, at the end.
    """
    clips = _Clips(reasoner, options)
    count = failed = 0
    try:
        for request in requests:
            count += 1
            media, answer, error = "", None, None
            question, kind = read_context(request.context)
            try:
                source = read_visuals(request.visuals())
                media = ", ".join(map(str, source)) if _are_paths(source) else ""
                clip = clips.get(source, request)
                keywords: AskKeywords = {**options.asking(), **_sampling(request.generation), "kind": kind}
                answer = clip.ask(question, **keywords)
            except Cancelled:
                raise
            except MlxvrError as failure:
                error = " ".join(str(failure).split())
                failed += 1
                _log.warning("%s %s is not answered: %s", request.task, request.doc_id, error)
            if log is not None:
                sample = Sample(
                    id=f"{request.task}-{request.doc_id}",
                    task=request.task,
                    kind=_GRADED_AS[kind],
                    question=question,
                    media=media,
                    error=error,
                )
                _log_sample(log, sample, answer, options.mode)
            yield Response("" if answer is None else answer.text, answer, error)
    finally:
        clips.close()
    if failed:
        _log.error("%d of %d questions could not be answered and count as wrong", failed, count)


def read_context(context: str) -> tuple[str, Kind]:
    r"""Split a task's prompt into a question and its kind, so that our prompt says nothing twice.

    A task may already say our words, all or the last of them (``Put your final answer in \boxed{}.``): these are
    removed, because `question_text` puts them back. Any other prompt stays as it is. lmms-eval's placeholders `<image>`
    and `<video>` are removed: media come first.
    """
    text = _PLACEHOLDER.sub("", context).strip()
    for kind in KINDS:
        head, tail = question_text("\0", kind=kind).split("\0")
        if text.startswith(head) and text.endswith(tail.strip()) and len(text) > len(head) + len(tail.strip()):
            return text[len(head) : -len(tail.strip())].strip(), kind  # type: ignore[return-value]
    return text, "qa"


def read_visuals(visuals: Any) -> list[Any]:
    """The media that a task names for one question: paths and pictures, in order; an empty list for text alone.

    Raises `ConfigError` for what is neither: sound, an address on the network, several videos.
    """
    if visuals is None:
        return []
    sources = [*_flat(visuals)] if isinstance(visuals, list | tuple) else [visuals]
    for source in sources:
        if isinstance(source, str) and "://" in source:
            raise ConfigError(f"the task hands over an address, {source}: download the file, only local ones are read")
        if not isinstance(source, str | os.PathLike | Image.Image):
            raise ConfigError(
                f"the task hands over a {type(source).__name__}: only videos and pictures can be looked at"
            )
    if len(sources) > 1 and not all(isinstance(source, Image.Image) or _is_picture(source) for source in sources):
        raise ConfigError(f"the task hands over {len(sources)} videos for one question: only one can be looked at")
    return sources


def open_log(path: str | os.PathLike[str], reasoner: "Reasoner", options: LmmsOptions) -> SampleWriter:
    """Open the log of a run, or continue it; `mlxvr.evaluation.samples.read_samples` reads it.

    Raises `ConfigError` when the file is of a run with other settings, or cannot be written.
    """
    settings = {name: value for name, value in asdict(options).items() if name not in _WHERE | _MEMORY}
    if options.threshold is None:
        settings["threshold"] = reasoner.threshold
    spec = reasoner.spec.with_overrides(
        fps=options.fps, max_frames=options.max_frames, video_tokens=options.video_tokens, sample_by=_SAMPLE_BY
    )
    return SampleWriter(path, {"harness": "lmms-eval", **reasoner.identity(), **settings, **asdict(spec)})


class _Clips:
    """The open clip, kept as long as questions are about it."""

    def __init__(self, reasoner: "Reasoner", options: LmmsOptions) -> None:
        self._reasoner, self._options = reasoner, options
        self._key: tuple[Any, ...] | None = None
        self._clip: Clip | None = None

    def get(self, source: list[Any], request: LmmsRequest) -> "Clip":
        """The clip of these visuals; paths identify files, the question identifies pictures in memory."""
        key = tuple(map(str, source)) if _are_paths(source) else (request.task, request.split, request.doc_id)
        if self._clip is None or key != self._key:
            self.close()
            self._clip, self._key = self._open(source), key
        return self._clip

    def close(self) -> None:
        """Close the clip and free its keys and values."""
        if self._clip is not None:
            self._clip.close()
        self._clip = self._key = None

    def _open(self, source: list[Any]) -> "Clip":
        limits = self._options.several if len(source) > 1 else self._options
        options = FrameOptions(
            fps=limits.fps,
            max_frames=limits.max_frames,
            video_tokens=limits.video_tokens,
            image_tokens=limits.image_tokens,
            sample_by=_SAMPLE_BY,
        )
        try:
            return self._reasoner.open_with(source if len(source) > 1 else source[0] if source else None, options)
        except (MlxvrError, MemoryError):
            raise
        except Exception as error:  # a decoder may raise anything about a broken file
            raise MediaError(f"{source[0]}: {type(error).__name__}: {error}") from error


def _flat(visuals: Sequence[Any]) -> Iterator[Any]:
    for visual in visuals:
        if isinstance(visual, list | tuple):
            yield from _flat(visual)
        elif visual is not None:
            yield visual


def _are_paths(source: list[Any]) -> bool:
    return all(isinstance(path, str | os.PathLike) for path in source)


def _is_picture(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() in PICTURE_SUFFIXES


def _sampling(generation: Mapping[str, Any]) -> AskKeywords:
    """Temperature and top-p of a task that samples; others are decoded greedily."""
    temperature = generation.get("temperature") or 0.0
    if temperature <= 0 or generation.get("do_sample") is False:
        return {}
    return {"temperature": float(temperature), "top_p": float(generation.get("top_p") or 1.0)}


def _log_sample(log: SampleWriter, sample: Sample, answer: Answer | None, mode: Mode) -> None:
    """Append a question and its answer to the log; a question that the log has, from an earlier run or a repeat, stays.

    Args:
        log: the log.
        sample: the question, and the error where it failed.
        answer: None where it failed.
        mode: how it was asked.
    """
    if sample.id in log.done:
        return
    if answer is not None:
        usage = answer.usage
        exited = answer.confidence is not None and answer.confidence >= answer.threshold
        sample = replace(
            sample,
            first=answer.first,
            confidence=answer.confidence,
            second=answer.second,
            reasoning=answer.reasoning,
            text=answer.text,
            first_tokens=usage.first_answer_tokens,
            total_tokens=usage.generated_tokens,
            prompt_tokens=usage.prompt_tokens,
            video_tokens=usage.video_tokens,
            first_seconds=usage.first_answer_seconds,
            total_seconds=usage.first_answer_seconds + usage.reasoning_seconds,
            prefill_seconds=usage.vision_seconds + usage.prefill_seconds,
            media_seconds=usage.media_seconds,
            problems=answer.problems,
            reasoned=mode == "think" or (mode == "auto" and not exited),
        )
    log.write(sample)
