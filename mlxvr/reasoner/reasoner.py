"""The API that an app embeds: `load` a model, `open` a clip, `ask` about it.

    reasoner = mlxvr.load()
    clip = reasoner.open("clip.mp4", fps=2.0)
    answer = clip.ask("Which cup hides the ball?", options=["left", "middle", "right"])
    for event in clip.stream("What colour is it?"): ...        # FirstAnswer, ReasoningDelta, .., Answer

System prompt and video are a prefix that every question about a clip shares. A `Clip` computes it once and keeps its
keys and values; each question rewinds the cache to the end of the prefix and computes its own text only.

All reasoners of a process run their MLX work on one thread that they share (see `mlxvr.runtime.worker`), so they may be
called from any thread: the calls of one are served in order, and reasoners take turns. Calls wait, so an event loop
uses `await asyncio.to_thread(clip.ask, ...)`. To stop a single question, `stream` it and close the stream, from any
thread. Code of an app that evaluates MLX arrays itself does so inside `mlxvr.runtime.device_lock.use_device`.
"""

import dataclasses
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mlxvr.answering.events import Answer, Event, FirstAnswer, Option, ReasoningDelta, Usage
from mlxvr.answering.loop import (
    AskOptions,
    AskRequest,
    Outcome,
    TokenLike,
    check_names,
    make_answer,
    run_answer_loop,
)
from mlxvr.answering.sampling_config import is_number, is_whole
from mlxvr.checkpoint import hub
from mlxvr.checkpoint.bundled import NOT_OF_THE_DEMO, demo_folder, is_bundled, is_demo
from mlxvr.checkpoint.defaults import Defaults, EffectiveSetting
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.errors import Cancelled, ConfigError
from mlxvr.media import VisionInput, load_vision
from mlxvr.model import decode, loading
from mlxvr.model.prefix import Prefix, PrefixCost
from mlxvr.model.prompt import Prompt, build_prompt
from mlxvr.reasoner.clip_cache import ClipCache
from mlxvr.runtime import device_memory
from mlxvr.runtime.hooks import Progress, ShouldStop
from mlxvr.runtime.worker import Worker

if TYPE_CHECKING:
    from mlxvr.media.vision import VisionSource
    from mlxvr.model.network import VideoModel

__all__ = [
    "Answer",
    "Clip",
    "FirstAnswer",
    "Option",
    "Reasoner",
    "ReasoningDelta",
    "Usage",
    "demo_folder",
    "find_folder",
    "load",
]

logger = logging.getLogger(__name__)


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
    model: str | PathLike[str] | None = None,
    *,
    adapter: str | PathLike[str] | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    kv_bits: int | None = None,
    prefill_step_size: int = 2048,
    memory_limit: float | None = None,
    progress: Progress | None = None,
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
        prefill_step_size: how many prompt tokens go through the model at once; less takes less memory.
        memory_limit: gigabytes (10**9 bytes) that MLX may use in this process; None: what the system recommends on
            Metal, all memory elsewhere.
        progress: called with (stage, done, total) while a Hub id is downloaded.

    Raises:
        CheckpointError: the model cannot be found, is damaged, incomplete, unsupported or unsafe.
        OutOfMemoryError: its weights do not fit.
        ConfigError: an option has a value that cannot be used.
    """
    if not is_whole(prefill_step_size) or prefill_step_size < 1:
        raise ConfigError(f"prefill_step_size {prefill_step_size!r} is no whole number above 0: 2048 is the default")
    for name, value in (("model", model), ("adapter", adapter)):
        if value is not None and not isinstance(value, str | PathLike):
            raise ConfigError(f"{name} is {value!r}: give the path of a folder" + " or a Hub id" * (name == "model"))
    folder = find_folder(model, revision=revision, progress=progress)
    worker = Worker(release=device_memory.free_unused)
    try:
        limit = device_memory.usable_memory() if memory_limit is None else int(memory_limit * 1e9)
        network = worker.call(lambda _: _load_within(limit, folder, adapter=adapter, dtype=dtype))
        worker.call(lambda _: network.make_cache(kv_bits))  # refuses what cannot be done here, before a clip is read
        reasoner = Reasoner(network, worker, kv_bits=kv_bits, prefill_step_size=prefill_step_size, memory_limit=limit)
        reasoner.name = "bundled demo" if model is None else str(model)
        return reasoner
    except BaseException:
        worker.close()
        raise


def _load_within(
    limit: int, path: str | PathLike[str], *, adapter: str | PathLike[str] | None, dtype: str | None
) -> "VideoModel":
    """Load a model if its weights fit, on the thread of all reasoners."""
    folder = ModelFolder.open(path)
    device_memory.refuse_over(limit, loading.weight_bytes(folder, dtype=dtype))
    return loading.load_model(folder, adapter=adapter, dtype=dtype)


class Reasoner:
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

    def __init__(
        self,
        network: "VideoModel",
        worker: Worker,
        *,
        kv_bits: int | None = None,
        prefill_step_size: int = 2048,
        memory_limit: int | None = None,
    ):
        """Take over a network that was loaded on the worker's thread; `load` is the usual way in.

        `memory_limit`: bytes that MLX may use.
        """
        self.name = network.family.name
        self._network: VideoModel | None = network
        self._worker = worker
        limit = device_memory.usable_memory() if memory_limit is None else memory_limit
        self._cache = ClipCache(limit, max(0, limit - device_memory.active_memory()) // 2)
        self.kv_bits = kv_bits
        self.prefill_step_size = prefill_step_size
        assert network.folder is not None, "made by load_model"
        self._warned: set[str] = set()
        self._defaults = Defaults.of(network.folder)
        self.threshold = self._defaults.threshold
        self.task_thresholds = dict(self._defaults.task_thresholds)
        self.spec = self._defaults.spec
        self.system_prompt = self._defaults.system_prompt
        self._warns_of_demo = is_demo(network.folder.settings)

    @property
    def cache_budget(self) -> int:
        """Bytes for keys and values of all open clips."""
        return self._cache.budget

    @cache_budget.setter
    def cache_budget(self, budget: int) -> None:
        self._cache.budget = budget

    def open(
        self,
        source: "VisionSource | VisionInput | None",
        *,
        fps: float | None = None,
        max_frames: int | None = None,
        frames: int | None = None,
        video_tokens: int | None = None,
        image_tokens: int | None = None,
        timestamps: Sequence[float] | None = None,
        sample_by: str | None = None,
        start: float | None = None,
        end: float | None = None,
        progress: Progress | None = None,
    ) -> "Clip":
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
            ConfigError: an option has a value that cannot be used.
        """
        self._alive()
        if frames is not None and not is_whole(frames):
            raise ConfigError(f"frames is {frames!r}: give a whole number of frames")
        for name, seconds in (("start", start), ("end", end)):
            if seconds is not None and not is_number(seconds):
                raise ConfigError(f"{name} is {seconds!r}: give seconds, such as 65.5")
        if fps is not None and timestamps is not None:
            raise ConfigError("fps and timestamps both say when frames were taken: give one of them")
        spec = self.spec.with_overrides(
            fps=fps,
            max_frames=max_frames,
            video_tokens=video_tokens,
            image_max_tokens=image_tokens,
            sample_by=sample_by,
        )
        self._warn_of_demo(source)
        started = time.perf_counter()
        vision = (
            source
            if source is None or isinstance(source, VisionInput)
            else self._worker.run_here(
                lambda should_stop: load_vision(
                    source,
                    spec,
                    timestamps=timestamps,
                    nframes=frames,
                    start=start,
                    end=end,
                    progress=progress,
                    should_stop=should_stop,
                )
            )
        )
        path = Path(source) if isinstance(source, str | PathLike) else None
        clip = Clip(self, vision, path=path, media_seconds=time.perf_counter() - started, progress=progress)
        logger.debug("opened %r in %.2f s", clip, clip._media_seconds)
        return clip

    def ask(self, source: "VisionSource", question: str, **options: Any) -> Answer:
        """Open a clip, ask one question and close the clip; takes the options of `open` and of `Clip.ask`."""
        check_names(options, also=_OPENING)
        opening = {name: options.pop(name) for name in _OPENING & options.keys()}
        with self.open(source, **opening) as clip:
            return clip.ask(question, **options)

    def restore(self, path: str | PathLike[str]) -> "Clip":
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

    @property
    def settings(self) -> tuple[EffectiveSetting, ...]:
        """What holds where a question asks for nothing else, and where each value comes from.

        The names are "threshold", "task_thresholds", "system_prompt" and the limits of frames and tokens; `source` of
        what was set on this reasoner is "caller".
        """
        return self._defaults.settings(
            threshold=self.threshold,
            task_thresholds=self.task_thresholds,
            system_prompt=self.system_prompt,
            spec=self.spec,
        )

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, such as `Answer.token_ids`, special ones included."""
        return self._alive().tokenizer.decode(token_ids)

    def identity(self) -> dict[str, str]:
        """What answers depend on beside options: "family", "weights" (with adapter and dtype) and "system_prompt"."""
        network = self._alive()
        return {
            "family": network.family.name,
            "weights": network.fingerprint,
            "system_prompt": self.system_prompt,
        }

    def cancel(self) -> None:
        """Stop whatever runs or waits; its callers get `mlxvr.Cancelled`. The reasoner stays usable."""
        self._worker.cancel()

    def close(self) -> None:
        """Stop all work, give the memory back and end the thread. Clips of this reasoner can no longer be asked."""
        self._network = None
        self._worker.close(self._cache.clear)

    def __repr__(self) -> str:
        if self._network is None:
            return f"<Reasoner {self.name}, closed>"
        return f"<Reasoner {self.name} ({self._network.family.name}), threshold {self.threshold:g}>"

    def __enter__(self) -> "Reasoner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _warn_of_demo(self, source: object) -> None:
        """Say once that the demo model knows no real videos, where it is shown a file that may be one."""
        if self._warns_of_demo and isinstance(source, str | PathLike) and not is_bundled(source):
            self._warns_of_demo = False
            logger.warning(NOT_OF_THE_DEMO)

    def _warn_once(self, line: str) -> None:
        if line and line not in self._warned:
            self._warned.add(line)
            logger.warning("%s", line)

    def _load_prefix(self, file: Path) -> Prefix:
        """Read a saved prefix, on the thread of all reasoners."""
        return Prefix.load(file, self._alive(), self._prefix_settings(), kv_bits=self.kv_bits)

    def _prefix_settings(self) -> dict[str, object]:
        """What a clip's prefix depends on beside the model."""
        return {"system_prompt": self.system_prompt, **dataclasses.asdict(self.spec)}

    def _alive(self) -> "VideoModel":
        if self._network is None:
            raise ConfigError("this reasoner is closed: load it again with mlxvr.load(...)")
        return self._network


class Clip:
    """A clip that questions can be asked about. Made by `Reasoner.open`; a context manager that closes itself.

    Attributes:
        path: the file or folder that it was opened from; None for frames in memory, text alone and restored clips.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        vision: VisionInput | None,
        *,
        media_seconds: float,
        path: Path | None = None,
        progress: Progress | None = None,
        file: Path | None = None,
    ):
        """`Reasoner.open` and `Reasoner.restore` are the ways in; `file` is what the clip was restored from."""
        self.path = path
        self._reasoner = reasoner
        self._vision = vision
        self._prefix: Prefix | None = None
        self._media_seconds = media_seconds
        self._file = file
        self._progress = progress

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches over time, height and width; (0, 0, 0) of a clip without media."""
        return (0, 0, 0) if self._vision is None else self._vision.grid

    @property
    def seconds(self) -> tuple[float, ...]:
        """Source time of each temporal patch (the mean of its frames); empty for an image."""
        return () if self._vision is None else self._vision.seconds

    def __repr__(self) -> str:
        shown = "text alone" if self._vision is None else "an image"
        if self.seconds:
            shown = f"{len(self.seconds)} pairs of frames from {self.seconds[0]:.2f} to {self.seconds[-1]:.2f} s"
        name = self.path or (self._file and f"restored from {self._file}")
        return f"<Clip {f'{name}: ' if name else ''}{shown}, asked of {self._reasoner!r}>"

    def ask(self, question: str, **options: Unpack[AskOptions]) -> Answer:
        """Ask a question and wait for its answer.

        Args:
            question: the question, or for kind "grounding" the description of the segment to find.
            **options: `options` (choices without letters), `kind` ("qa", "grounding", "grounded_qa"), `mode` ("auto",
                "direct", "think"), `threshold`, `max_tokens`, `temperature`, `top_p`, `seed`, `response_prefix`,
                `options_may_repeat`; `mlxvr.answering.loop.AskRequest` describes them and their defaults.

        Raises:
            ConfigError: an option has a value that cannot be used, or the prompt is longer than the model's context.
            Cancelled: `Reasoner.cancel` or `Reasoner.close` was called meanwhile.
        """
        *_, answer = self.stream(question, **options)
        assert isinstance(answer, Answer), "a stream ends with its Answer"
        return answer

    def stream(self, question: str, **options: Unpack[AskOptions]) -> Generator[Event, None, None]:
        """Ask a question and get events as they happen: `FirstAnswer`, `ReasoningDelta`s, and the `Answer` last.

        Work begins at once. Closing the generator, from any thread, stops it and waits until it has ended; the clip
        stays usable. A generator that is dropped (such as by leaving its loop) stops its work too. Options and errors
        are those of `ask`.
        """
        check_names(options)
        asked = AskRequest(question, **options)
        self._reasoner._warn_once(asked.without_effect())
        self._reasoner._alive()
        return self._reasoner._worker.stream(lambda should_stop: self._answer(asked, should_stop))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the clip's prefix (keys and values) as safetensors, atomically; `Reasoner.restore` reads it.

        The prefix is computed first if no question has been asked yet.
        """
        network = self._reasoner._alive()
        if self._vision is None:
            raise ConfigError("a clip without media has nothing to save: ask its questions anew")

        def work(should_stop: ShouldStop) -> None:
            prompt = self._prompt(network, AskRequest("?"))
            prefix, _ = self._prepare(network, prompt, self._make_room(network, prompt, 0), should_stop)
            prefix.save(Path(path), network, self._reasoner._prefix_settings())

        self._reasoner._worker.call(work)

    def close(self) -> None:
        """Give the memory of the clip's keys and values back; a later question computes them anew."""
        if not self._reasoner._worker.closed:
            self._reasoner._worker.call(lambda _: setattr(self, "_prefix", None))

    def __enter__(self) -> "Clip":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What follows runs on the reasoner's thread.

    def _answer(self, question: AskRequest, should_stop: ShouldStop) -> Iterator[Event]:
        """Answer, and forget the prefix if that fails: what a failed evaluation left of it is not built upon.

        A rewind takes back what was refused or stopped, as it takes back an answer.
        """
        try:
            yield from self._think(question, should_stop)
        except (Cancelled, ConfigError):
            raise
        except Exception:
            self._prefix = None
            device_memory.free_unused()
            raise

    def _think(self, question: AskRequest, should_stop: ShouldStop) -> Iterator[Event]:
        """Prefill, decode and decide; yields events, the `Answer` last."""
        network = self._reasoner._alive()
        threshold = self._reasoner.threshold if question.threshold is None else question.threshold
        with device_memory.track_peak() as peak, device_memory.wired():
            prompt = self._prompt(network, question)
            max_tokens = min(question.max_tokens, network.context_length - len(prompt.ids))
            fresh = self._prefix is None and self._file is None
            step_size = self._make_room(network, prompt, max_tokens)
            prefix, cost = self._prepare(network, prompt, step_size, should_stop)
            started = time.perf_counter()
            logits = prefix.extend(network, prompt, step_size=step_size, should_stop=should_stop)
            prefill_seconds = cost.prefill_seconds + time.perf_counter() - started
            logger.debug(
                "%s of %d tokens, %d of them reused, in %.2f s",
                "first prompt" if fresh else "prompt",
                len(prompt.ids),
                0 if fresh else prefix.length,
                cost.vision_seconds + prefill_seconds,
            )
            sampler = None
            if question.temperature > 0:
                sampler = decode.Sampler(question.temperature, top_p=question.top_p, seed=question.seed)
            tokens = decode.decode(
                network,
                logits,
                prefix.cache,
                prompt.next_position,
                max_tokens=max_tokens,
                sampler=sampler,
                stop_ids=network.eos_ids,
            )
            outcome = Outcome()
            with closing(tokens):
                yield from run_answer_loop(
                    _until(tokens, should_stop),
                    network.tokenizer.decode,
                    outcome,
                    mode=question.mode,
                    threshold=threshold,
                    max_tokens=max_tokens,
                    stop_ids=network.eos_ids,
                    response_prefix_ids=prompt.response_prefix_ids,
                    options=question.options or (),
                )
            usage = Usage(
                prompt_tokens=len(prompt.ids),
                video_tokens=int(prompt.media_mask.sum()),
                cached_tokens=0 if fresh else prefix.length,
                first_answer_tokens=outcome.first_answer_tokens,
                reasoning_tokens=len(outcome.token_ids) - outcome.first_answer_tokens,
                media_seconds=self._media_seconds if fresh else 0.0,
                vision_seconds=cost.vision_seconds,
                prefill_seconds=prefill_seconds,
                first_answer_seconds=outcome.first_answer_seconds,
                reasoning_seconds=outcome.reasoning_seconds,
                peak_memory_bytes=peak.bytes,
            )
        logger.debug(
            "confidence %s at threshold %g, mode %s: %s after %d tokens",
            None if outcome.scored is None else f"{outcome.scored.confidence:.4f}",
            threshold,
            question.mode,
            "stopped at the first answer" if outcome.exited else "went on to the end",
            len(outcome.token_ids),
        )
        self._reasoner._cache.touch(self)
        yield make_answer(outcome, threshold, usage, question.options or ())

    def _prompt(self, network: "VideoModel", question: AskRequest) -> Prompt:
        return build_prompt(
            network.tokenizer,
            network.family,
            network.config,
            [] if self._vision is None else [self._vision],
            question.text,
            options=question.options,
            kind=question.kind,
            response_prefix=question.response_prefix,
            system=self._reasoner.system_prompt,
        )

    def _make_room(self, network: "VideoModel", prompt: Prompt, answer_tokens: int) -> int:
        """Make room for a question; the step size with which its prompt is read."""
        reasoner = self._reasoner
        return reasoner._cache.make_room(
            self,
            network,
            prompt,
            answer_tokens=answer_tokens,
            step_size=reasoner.prefill_step_size,
            kv_bits=reasoner.kv_bits,
        )

    def _prepare(
        self, network: "VideoModel", prompt: Prompt, step_size: int, should_stop: ShouldStop
    ) -> tuple[Prefix, PrefixCost]:
        """The clip's prefix, computed now if it was not before."""
        if self._prefix is None and self._file is not None:  # its patches are gone
            self._prefix = self._reasoner._load_prefix(self._file)
        if self._prefix is not None:
            return self._prefix, PrefixCost(0.0, 0.0)
        prefix, cost = Prefix.compute(
            network,
            prompt,
            kv_bits=self._reasoner.kv_bits,
            step_size=step_size,
            progress=self._progress,
            should_stop=should_stop,
        )
        self._prefix = prefix
        self._reasoner._cache.touch(self)
        return prefix, cost


_OPENING = frozenset(signature(Reasoner.open).parameters) - {"self", "source"}


def _until(tokens: Iterator[TokenLike], should_stop: ShouldStop) -> Iterator[TokenLike]:
    """Pass tokens on until the work should stop."""
    for token in tokens:
        if should_stop():
            raise Cancelled("the answer was cancelled while it was written")
        yield token
