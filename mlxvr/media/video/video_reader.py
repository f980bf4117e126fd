"""Read only those frames of a video file that a model should see.

There are three ways of reading, each slower and safer than the one before:

1. decode the cheapest stretches by the timeline (`decode_plan`), shared among several decoders;
2. decode one stretch from the start, by the same timeline;
3. decode everything twice: once to count the frames, once to pick them.

Healthy mp4, mov, mkv and webm files are read the first way. The others are for files that turn out to differ from their
timeline; the log says which way was taken. All return the same frames: frame k is the k-th frame of a full decode. For
a range of a large file only the range is read, if that gives the same frames (`window`).

Pictures equal those of the training code's readers (qwen-vl-utils with torchcodec, decord or torchvision): colours by
the stream's own matrix and range, no tone mapping of HDR, no deinterlacing, and pixels as they are stored, even if a
player would stretch them. Rotation is applied, as in decord, and times are a player's.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av

from mlxvr.errors import ConfigError, MediaError
from mlxvr.media import container as outline
from mlxvr.media.frame_options import ALL_FRAMES, FrameSelection
from mlxvr.media.patches import Frames
from mlxvr.media.sampling import check_range, frame_size
from mlxvr.media.selection import Selection, select
from mlxvr.media.spec import VisionSpec
from mlxvr.media.video.decode_plan import Stretch, plan_stretches, whole_stretch
from mlxvr.media.video.decoding import Unreliable, decode_counted, decode_stretch, open_video
from mlxvr.media.video.frame_sink import FrameSink, Orientation
from mlxvr.media.video.timeline import Timeline, count_frames, scan
from mlxvr.media.video.window import scan_range
from mlxvr.runtime.hooks import NO_HOOKS, Hooks, ShouldStop
from mlxvr.runtime.thread_pool import core_count, run_together
from mlxvr.storage.paths import local_path

__all__ = ["VideoInfo", "probe", "read_video"]

logger = logging.getLogger(__name__)

_PARTS_PER_CORE = 4  # stretches per decoder, so that all decoders end at about the same time
_DECODER_BYTES = 1 << 30  # the most memory for the frames of all decoders together
_WORTHWHILE = 16 << 20  # bytes of a file from which a range is read alone; a smaller file is scanned in no time
_MOST_TOKENS = 1 << 20  # the longest context that any family can be extended to
_MEMORY_SHARE = 0.5  # the share of the machine's memory that frames and their patches may take
_FRAMES_PER_DECODER = 16  # the most full-size frames that a decoder keeps for reference and reordering


@dataclass(frozen=True)
class VideoInfo:
    """The properties of a video file."""

    width: int  # pixels as displayed, after rotation
    height: int
    rotation: int  # degrees by which stored frames are turned counter-clockwise for display: 0, 90, 180 or 270
    fps: float  # average
    frames: int
    duration: float  # seconds on a player's clock, to the end of the last frame
    codec: str  # FFmpeg's name: h264, hevc, vp9, ...
    variable_rate: bool


@dataclass(frozen=True)
class _Request:
    """The arguments of one `read_video`."""

    path: Path
    spec: VisionSpec
    wanted: FrameSelection
    hooks: Hooks
    missing: int  # bytes that are missing from the end of the file


def probe(path: str | Path) -> VideoInfo:
    """Describe a video; decodes only its first frame, or all frames if the file has no timeline.

    Raises `MediaError` if the file is missing, is not a video or cannot be decoded.
    """
    path = local_path(path)
    outline.check_file(path)
    is_cut = outline.missing_bytes(path) > 0
    with open_video(path) as (container, stream):
        timeline = scan(container, stream, is_cut=is_cut)
    if timeline is None:
        with open_video(path) as (container, stream):
            timeline = count_frames(container, stream, is_cut=is_cut)
    with open_video(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None or not len(timeline):
            raise MediaError(f"{path} holds no frame that can be decoded: copy or download it again")
        height, width = Orientation.of(frame).size(frame.height, frame.width)
        return VideoInfo(
            width=width,
            height=height,
            rotation=frame.rotation % 360,
            fps=timeline.fps,
            frames=len(timeline),
            duration=timeline.offset + timeline.duration,
            codec=stream.codec_context.name,
            variable_rate=timeline.is_variable,
        )


def read_video(
    path: str | Path, spec: VisionSpec, selection: FrameSelection = ALL_FRAMES, hooks: Hooks = NO_HOOKS
) -> Frames:
    """Sample a video's frames, turned upright and resized for the model.

    Args:
        path: an mp4, mov, mkv, webm, avi, ts or other file that FFmpeg reads.
        spec: sampling rate, bounds and sizes.
        selection: how many frames to sample in all, instead of `spec.fps` frames per second; the range, in seconds on a
            player's clock, in which sampled frames are shown.
        hooks: progress is called with ("decoding", frames done, frames wanted); should_stop several times a second, and
            True ends the reading.

    Raises:
        MediaError: the file or the range cannot be read; the message says why.
        ConfigError: an option has a value that cannot be used.
        Cancelled: `hooks.should_stop` returned True.
    """
    path = local_path(path)
    outline.check_file(path)
    start, end, should_stop = selection.start, selection.end, hooks.should_stop
    check_range(start, end)
    missing = outline.missing_bytes(path)
    request = _Request(path, spec, selection, hooks, missing)
    if (start is not None or end is not None) and not missing and path.stat().st_size >= _WORTHWHILE:
        with open_video(path) as (container, stream):
            try:
                timeline = scan_range(container, stream, start=start, end=end, should_stop=should_stop)
            except av.error.FFmpegError as error:  # the file cannot be read out of order
                logger.info("%s: FFmpeg says %s", path, error.strerror)
                timeline = None
            if timeline is not None:
                frames = _read_by_timeline(request, container, stream, timeline)
                if frames is not None:
                    return frames
        logger.info("%s: the range cannot be read alone; reading the whole index", path)
    with open_video(path) as (container, stream):
        timeline = scan(container, stream, is_cut=missing > 0, should_stop=should_stop)
        if timeline is not None:
            frames = _read_by_timeline(request, container, stream, timeline)
            if frames is not None:
                return frames
    return _read_by_counting(request)


def _read_by_timeline(request: _Request, container: Any, stream: Any, timeline: Timeline) -> Frames | None:
    """Read a file in one of the first two ways; None if the file differs from its timeline."""
    selection = _select(request, container, stream, timeline)
    slots = _slots(selection)
    cores = core_count()
    stretches = plan_stretches(timeline, selection.frames, parts=_PARTS_PER_CORE * cores)
    decoders = _decoder_count(stretches, cores, stream.width * stream.height)
    threads = 0 if decoders == 1 else cores // decoders  # 0: FFmpeg's choice
    with _sink(request, len(selection)) as sink:
        try:
            queue = deque(sorted(stretches, key=lambda stretch: -stretch.cost))  # the longest first, to end together
            work = partial(_decode_queue, request.path, timeline, queue, slots, sink, threads=threads)
            _run(request, sink, [work] * decoders)
            return _frames(timeline, selection, sink)
        except Unreliable as reason:
            logger.info("%s: %s; decoding it from the start", request.path, reason)
            sink.reset()
        if timeline.is_part:  # it does not start where the file does
            return None
        try:
            queue = deque([whole_stretch(timeline, selection.frames)])
            _run(request, sink, [partial(_decode_queue, request.path, timeline, queue, slots, sink, tolerant=True)])
            logger.warning("%s may be damaged: some of its pictures may not be as they were recorded", request.path)
            return _frames(timeline, selection, sink)
        except Unreliable as reason:
            logger.info("%s: %s; counting its frames", request.path, reason)
    return None


def _slots(selection: Selection) -> dict[int, list[int]]:
    """Map each frame to its places among the frames to return."""
    slots: dict[int, list[int]] = {}
    for place, frame in enumerate(selection.frames):
        slots.setdefault(int(frame), []).append(place)
    return slots


def _decode_queue(  # 8 parameters: what decoders share, and how this way of reading treats damage
    path: Path,
    timeline: Timeline,
    queue: deque[Stretch],
    slots: Mapping[int, Sequence[int]],
    sink: FrameSink,
    should_stop: ShouldStop,
    *,
    threads: int = 0,
    tolerant: bool = False,
) -> None:
    """Decode stretches from a queue shared with other decoders until it is empty."""
    with open_video(path, threads=threads) as (container, stream):
        is_new = True
        while queue:
            try:
                stretch = queue.popleft()
            except IndexError:  # another decoder took the last one
                return
            decode = partial(decode_stretch, is_new=is_new, tolerant=tolerant, should_stop=should_stop)
            try:
                decode(container, stream, timeline, stretch, slots, sink)
            except av.error.FFmpegError as error:
                raise Unreliable(f"FFmpeg says {error.strerror}") from error
            is_new = False


def _decoder_count(stretches: list[Stretch], cores: int, pixels: int) -> int:
    """Return how many decoders to run: one per core, as far as the work splits evenly and memory allows."""
    costs = [stretch.cost for stretch in stretches]
    even = int(sum(costs) / max(costs))
    affordable = _DECODER_BYTES // max(1, pixels * 3 // 2 * _FRAMES_PER_DECODER)
    return max(1, min(cores, even, affordable, len(stretches)))


def _read_by_counting(request: _Request) -> Frames:
    """Read a file in the third way: decode everything, twice."""
    with open_video(request.path) as (container, stream):
        timeline = count_frames(container, stream, is_cut=request.missing > 0, should_stop=request.hooks.should_stop)
        if not len(timeline):
            holds = f"is cut short ({request.missing:,} bytes are missing) and holds" if request.missing else "holds"
            raise MediaError(f"{request.path} {holds} no frame that can be read: copy or download it again")
        selection = _select(request, container, stream, timeline)
    slots = _slots(selection)
    with _sink(request, len(selection)) as sink, open_video(request.path) as (container, stream):
        try:
            _run(request, sink, [lambda stop: decode_counted(container, stream, slots, sink, should_stop=stop)])
        except Unreliable as reason:
            raise MediaError(f"{request.path} is damaged: {reason}; copy or download it again") from reason
        return _frames(timeline, selection, sink)


def _run(request: _Request, sink: FrameSink, decoders: Sequence[Callable[[ShouldStop], None]]) -> None:
    def report() -> None:
        if request.hooks.progress is not None:
            request.hooks.progress("decoding", sink.done, sink.count)

    run_together(decoders, report=report, should_stop=request.hooks.should_stop)
    sink.finish()  # the last frames are still being resized
    report()


def _select(request: _Request, container: Any, stream: Any, timeline: Timeline) -> Selection:
    """Select the frames to read; raises if the file was cut before one of them, or if they would not fit in memory."""
    total = len(timeline)
    if request.missing:
        total = max(total, _stated_frames(container, stream, timeline))
    wanted = request.wanted
    selection = select(timeline, request.spec, nframes=wanted.frames, start=wanted.start, end=wanted.end, total=total)
    if selection.frames[-1] >= len(timeline):
        raise MediaError(
            f"{request.path} is cut short ({request.missing:,} bytes are missing): "
            f"{int((selection.frames < len(timeline)).sum())} of the {len(selection)} wanted frames can be read, "
            f"up to {timeline.duration:.1f} s; copy or download it again, or give an earlier end (--end, end=)"
        )
    _check_amount(request, len(selection), stream.height, stream.width)
    return selection


def _check_amount(request: _Request, count: int, height: int, width: int) -> None:
    """Raise `ConfigError` if no model reads so many frames, or if they would not fit in memory with their patches."""
    if not height or not width:  # only the first frame will tell
        return
    rows, columns = _choose_size(request, count, height, width)
    tokens = -(-count // request.spec.temporal_patch_size) * rows * columns // request.spec.factor**2
    advice = "lower fps or max_frames (--fps, --max-frames), or give a range with start and end (--start, --end)"
    if tokens > _MOST_TOKENS:
        raise ConfigError(
            f"{count:,} frames of {columns}x{rows} pixels make {tokens:,} tokens, and no model reads more than "
            f"{_MOST_TOKENS:,}: {advice}"
        )
    needed = 2 * count * rows * columns * 3
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > _MEMORY_SHARE * memory:
        raise ConfigError(
            f"{count:,} frames of {columns}x{rows} pixels need {needed / 1e9:,.1f} GB, and this machine has "
            f"{memory / 1e9:,.1f} GB: {advice}"
        )


def _stated_frames(container: Any, stream: Any, timeline: Timeline) -> int:
    """Return how many frames a file had before it was cut short, by its header."""
    if stream.frames:
        return int(stream.frames)
    return round((container.duration or 0) / av.time_base * timeline.fps)


def _sink(request: _Request, count: int) -> FrameSink:
    return FrameSink(count, partial(_choose_size, request, count))


def _choose_size(request: _Request, count: int, height: int, width: int) -> tuple[int, int]:
    try:
        return frame_size(height, width, count, request.spec)
    except MediaError as error:
        raise MediaError(f"{request.path}: {error}") from error


def _frames(timeline: Timeline, selection: Selection, sink: FrameSink) -> Frames:
    return Frames(
        pixels=sink.finish(),
        seconds=selection.seconds,
        sampled_fps=selection.sampled_fps,
        indices=selection.indices,
        source_size=sink.source_size,
        duration=timeline.offset + timeline.duration,
    )
