"""The API that an app embeds: `load` a model, `open` a clip, `ask` about it.

    reasoner = mlxvr.load()
    clip = reasoner.open("clip.mp4", fps=2.0)
    answer = clip.ask("Which cup hides the ball?", options=["left", "middle", "right"])
    for event in clip.stream("What colour is it?"): ...        # FirstAnswer, ReasoningDelta, .., Answer

All reasoners of a process run their MLX work on one thread that they share (see `mlxvr.runtime.worker`), so they may be
called from any thread: the calls of one are served in order, and reasoners take turns. Calls wait, so an event loop
uses `await asyncio.to_thread(clip.ask, ...)`. To stop a single question, `stream` it and close the stream, from any
thread. Code of an app that evaluates MLX arrays itself does so inside `mlxvr.runtime.device_lock.use_device`.
"""

import logging
import time
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast

from mlxvr.answering.events import Answer
from mlxvr.answering.loop import AskKeywords
from mlxvr.checkpoint import hub
from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.cli.settings import check_keywords
from mlxvr.errors import ConfigError
from mlxvr.media import VisionInput, load_vision
from mlxvr.media.frame_options import FrameKeywords, FrameOptions
from mlxvr.model import loading
from mlxvr.reasoner.clip import Clip
from mlxvr.reasoner.engine import Engine
from mlxvr.reasoner.load_options import LoadKeywords, LoadOptions
from mlxvr.runtime import device_memory
from mlxvr.runtime.hooks import Hooks, Progress, ShouldStop
from mlxvr.runtime.worker import Worker

if TYPE_CHECKING:
    from mlxvr.media.vision import VisionSource
    from mlxvr.model.network import VideoModel

__all__ = ["OpenAndAskKeywords", "Reasoner", "find_folder", "load", "load_with"]

logger = logging.getLogger(__name__)


class OpenAndAskKeywords(FrameKeywords, AskKeywords, total=False):
    """The keywords of `Reasoner.ask`: those of `Reasoner.open` and of `Clip.ask`."""


def find_folder(
    model: str | PathLike[str] | None = None, *, revision: str | None = None, progress: Progress | None = None
) -> Path:
    """The folder that `load` would load; downloads a Hub id that is not there yet. Arguments and errors as `load`."""
    if model is not None:
        return hub.resolve(model if isinstance(model, str) else Path(model), revision=revision, progress=progress)
    if revision is not None:
        raise ConfigError(f"revision {revision!r} is of a Hub id, and no model is named: name one, or leave it out")
    return demo_folder() / "checkpoint"


def load(
    model: str | PathLike[str] | None = None, *, progress: Progress | None = None, **options: Unpack[LoadKeywords]
) -> "Reasoner":
    """Load a model and start the thread that runs it.

    Args:
        model: a converted folder, a folder as transformers writes it, or a Hub id; None is the bundled demo checkpoint.
            A folder is loaded without touching the network.
        adapter: folder of LoRA weights to put on top, of mlxvr, mlx-vlm, mlx-lm or PEFT.
        revision: branch, tag or commit of a Hub id.
        dtype: "float32", "float16" or "bfloat16", what to compute in; None: the checkpoint's. CPUs with a good BLAS are
            fastest in float32. float16 is faster than bfloat16 on M1 and M2, which have no bfloat16 in hardware, but
            it ends at 65504: activations of Qwen2-VL and Qwen2.5-VL are known to go beyond that. A question whose
            logits are not finite is refused.
        kv_bits: keep keys and values in 2, 3, 4, 6 or 8 bits to save memory; None keeps them as computed. The fewer
            bits, the further confidences move.
        prefill_step_size: how many prompt tokens go through the model at once, 2048 by default; less takes less memory.
        memory_limit: gigabytes (10**9 bytes) that MLX may use in this process; None: what the system recommends on
            Metal, all memory elsewhere.
        progress: called with (stage, done, total) while a Hub id is downloaded.

    Raises:
        CheckpointError: the model cannot be found, is damaged, incomplete, unsupported or unsafe.
        OutOfMemoryError: its weights do not fit.
        ConfigError: an option does not exist, or has a value that cannot be used.
    """
    check_keywords(options, LoadKeywords, "progress")
    return load_with(LoadOptions(model=model, **options), progress)


def load_with(options: LoadOptions, progress: Progress | None = None) -> "Reasoner":
    """Do as `load` does, for code that has its keywords as an object."""
    folder = find_folder(options.model, revision=options.revision, progress=progress)
    worker = Worker(release=device_memory.free_unused)
    try:
        limit = device_memory.usable_memory() if options.memory_limit is None else int(options.memory_limit * 1e9)
        network = worker.call(lambda _: _load_within(limit, folder, options))
        worker.call(lambda _: network.make_cache(options.kv_bits))  # refuses what this machine cannot do, before a clip
        reasoner = Reasoner(
            network,
            worker,
            kv_bits=options.kv_bits,
            prefill_step_size=options.prefill_step_size,
            memory_limit=limit,
        )
        reasoner.name = "bundled demo" if options.model is None else str(options.model)
        return reasoner
    except BaseException:
        worker.close()
        raise


def _load_within(limit: int, path: Path, options: LoadOptions) -> "VideoModel":
    """Load a model if its weights fit, on the thread of all reasoners."""
    folder = ModelFolder.open(path)
    device_memory.refuse_over(limit, loading.weight_bytes(folder, dtype=options.dtype))
    return loading.load_model(folder, adapter=options.adapter, dtype=options.dtype)


class Reasoner(Engine):
    """A loaded model and the thread that runs it. Made by `load`; a context manager that closes itself.

    Attributes:
        name: what `load` was asked for, for people.
        threshold: the confidence from which a direct answer stands, where a question names none.
        task_thresholds: thresholds that were calibrated for tasks of their own, by name: for `Clip.ask(threshold=)`.
        spec: how frames are sampled and sized.
        system_prompt: what the model is told first; the checkpoint's own, unless another is set before a clip is asked.
        kv_bits, prefill_step_size: see `load`.
        cache_budget: bytes that keys and values of all open clips may take together; those of clips that were not asked
            for longest are given back, and computed anew when they are asked again. At first half of what the weights
            leave.
    """

    def open(
        self,
        source: "VisionSource | VisionInput | None",
        *,
        progress: Progress | None = None,
        **options: Unpack[FrameKeywords],
    ) -> Clip:
        """Read a clip's frames; the model first sees them when a question is asked.

        Args:
            source: path or `file:` URL of a video or an image, a PIL image, an (h, w, 3) uint8 array; frames: a folder
                of images, a list of images, paths or arrays, or an (n, h, w, 3) array; what `mlxvr.media.load_vision`
                made of one, with `spec`, for those who read the next clip meanwhile; None: questions of text alone.
            fps: frames to sample per second; of frames: the rate at which they were taken, and all of them are used up
                to `max_frames`. None: the checkpoint's.
            max_frames: the most frames to sample; None: the checkpoint's.
            frames: sample exactly this many (rounded to a multiple of two, at most as many as there are) instead of by
                `fps`.
            video_tokens: the most tokens that the whole clip may take, also an image; None: the checkpoint's. A frame
                never gets fewer than `spec.frame_min_tokens`; a clip that takes more for that reason is logged.
            image_tokens: the most tokens that an image may take; None: the checkpoint's, at most 4,096.
            timestamps: seconds of each frame, ascending, instead of `fps`; `start` and `end` are times on them.
            sample_by: "time" or "index": what frames are spread over evenly where a video's rate varies; None: the
                checkpoint's, else "time". At a constant rate both are the same.
            start: seconds on a player's clock; None: from the beginning.
            end: seconds on a player's clock; None: to the end.
            progress: called with (stage, done, total); stages are "decoding", "vision" and "prefill".

        Raises:
            MediaError: the file cannot be read as a video or an image, or the range is empty.
            ConfigError: an option does not exist, or has a value that cannot be used.
        """
        check_keywords(options, FrameKeywords, "progress")
        return self.open_with(source, FrameOptions(**options), progress)

    def open_with(
        self,
        source: "VisionSource | VisionInput | None",
        options: FrameOptions,
        progress: Progress | None = None,
    ) -> Clip:
        """Do as `open` does, for code that has its keywords as an object."""
        self._alive()
        spec = options.applied_to(self.spec)
        self._warn_of_demo(source)
        started = time.perf_counter()
        if source is None or isinstance(source, VisionInput):
            vision = source
        else:
            vision = self._worker.run_here(
                lambda should_stop: load_vision(source, spec, options, Hooks(progress, should_stop))
            )
        path = Path(source) if isinstance(source, str | PathLike) else None
        clip = Clip(self, vision, path=path, media_seconds=time.perf_counter() - started, progress=progress)
        logger.debug("opened %r in %.2f s", clip, clip._media_seconds)
        return clip

    def ask(
        self,
        source: "VisionSource",
        question: str,
        *,
        progress: Progress | None = None,
        **options: Unpack[OpenAndAskKeywords],
    ) -> Answer:
        """Open a clip, ask one question and close the clip; takes the options of `open` and of `Clip.ask`."""
        check_keywords(options, OpenAndAskKeywords, "progress")
        is_frame_option = FrameKeywords.__annotations__.keys().__contains__
        opening = cast(FrameKeywords, {name: value for name, value in options.items() if is_frame_option(name)})
        asking = cast(AskKeywords, {name: value for name, value in options.items() if not is_frame_option(name)})
        with self.open(source, progress=progress, **opening) as clip:
            return clip.ask(question, **asking)

    def restore(self, path: str | PathLike[str]) -> Clip:
        """Open a clip that `Clip.save` wrote: its prefix is not computed again.

        The file stays needed: keys and values that were given back are read from it again.

        Raises:
            ConfigError: the file is damaged, or was written with another model, adapter, dtype, `kv_bits`, system
                prompt, or other limits of frames and tokens; the message names all that differ.
        """
        self._alive()
        file = Path(path).absolute()

        def work(_: ShouldStop) -> Clip:
            prefix = self._load_prefix(file)
            clip = Clip(self, prefix.media[0] if prefix.media else None, media_seconds=0.0, file=file)
            clip._prefix = prefix
            self._cache.touch(clip)
            return clip

        return self._worker.call(work)

    def __enter__(self) -> "Reasoner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
