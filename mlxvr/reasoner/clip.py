"""A clip that questions are asked about.

System prompt and video are a prefix that every question about a clip shares. A `Clip` computes it once and keeps its
keys and values; each question rewinds the cache to the end of the prefix and computes its own text only.
"""

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from mlxvr.answering.events import Answer, Event, Usage
from mlxvr.answering.loop import AskKeywords, AskRequest, Outcome, TokenLike, make_answer, run_answer_loop
from mlxvr.cli.settings import check_keywords
from mlxvr.errors import Cancelled, ConfigError
from mlxvr.media import VisionInput
from mlxvr.model import decode
from mlxvr.model.prefix import Prefix, PrefixCost
from mlxvr.model.prompt import Prompt, build_prompt
from mlxvr.reasoner.engine import Engine
from mlxvr.runtime import device_memory
from mlxvr.runtime.hooks import Progress, ShouldStop

if TYPE_CHECKING:
    from mlxvr.model.network import VideoModel

__all__ = ["Clip"]

logger = logging.getLogger(__name__)


class Clip:
    """A clip that questions can be asked about. Made by `Reasoner.open`; a context manager that closes itself.

    Attributes:
        path: the file or folder that it was opened from; None for frames in memory, text alone and restored clips.
    """

    def __init__(
        self,
        engine: Engine,
        vision: VisionInput | None,
        *,
        media_seconds: float,
        path: Path | None = None,
        progress: Progress | None = None,
        file: Path | None = None,
    ):
        """`Reasoner.open` and `Reasoner.restore` are the ways in; `file` is what the clip was restored from."""
        self.path = path
        self._engine = engine
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
        return f"<Clip {f'{name}: ' if name else ''}{shown}, asked of {self._engine!r}>"

    def ask(self, question: str, **options: Unpack[AskKeywords]) -> Answer:
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

    def stream(self, question: str, **options: Unpack[AskKeywords]) -> Generator[Event, None, None]:
        """Ask a question and get events as they happen: `FirstAnswer`, `ReasoningDelta`s, and the `Answer` last.

        Work begins at once. Closing the generator, from any thread, stops it and waits until it has ended; the clip
        stays usable. A generator that is dropped (such as by leaving its loop) stops its work too. Options and errors
        are those of `ask`.
        """
        check_keywords(options, AskKeywords)
        return self.stream_with(AskRequest(question, **options))

    def stream_with(self, request: AskRequest) -> Generator[Event, None, None]:
        """Do as `stream` does, for code that has its arguments as an object."""
        self._engine._warn_once(request.without_effect())
        self._engine._alive()
        return self._engine._worker.stream(lambda should_stop: self._answer(request, should_stop))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the clip's prefix (keys and values) as safetensors, atomically; `Reasoner.restore` reads it.

        The prefix is computed first if no question has been asked yet.
        """
        network = self._engine._alive()
        if self._vision is None:
            raise ConfigError("a clip without media has nothing to save: ask its questions anew")

        def work(should_stop: ShouldStop) -> None:
            prompt = self._prompt(network, AskRequest("?"))
            prefix, _ = self._prepare(network, prompt, self._make_room(network, prompt, 0), should_stop)
            prefix.save(Path(path), network, self._engine._prefix_settings())

        self._engine._worker.call(work)

    def close(self) -> None:
        """Give the memory of the clip's keys and values back; a later question computes them anew."""
        if not self._engine._worker.closed:
            self._engine._worker.call(lambda _: setattr(self, "_prefix", None))

    def __enter__(self) -> "Clip":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What follows runs on the reasoner's thread.

    def _answer(self, request: AskRequest, should_stop: ShouldStop) -> Iterator[Event]:
        """Answer, and forget the prefix if that fails: what a failed evaluation left of it is not built upon.

        A rewind takes back what was refused or stopped, as it takes back an answer.
        """
        try:
            yield from self._think(request, should_stop)
        except (Cancelled, ConfigError):
            raise
        except Exception:
            self._prefix = None
            device_memory.free_unused()
            raise

    def _think(self, request: AskRequest, should_stop: ShouldStop) -> Iterator[Event]:
        """Prefill, decode and decide; yields events, the `Answer` last."""
        network = self._engine._alive()
        threshold = self._engine.threshold if request.threshold is None else request.threshold
        with device_memory.track_peak() as peak, device_memory.wired():
            prompt = self._prompt(network, request)
            max_tokens = min(request.max_tokens, network.context_length - len(prompt.ids))
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
            if request.temperature > 0:
                sampler = decode.Sampler(request.temperature, top_p=request.top_p, seed=request.seed)
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
                    mode=request.mode,
                    threshold=threshold,
                    max_tokens=max_tokens,
                    stop_ids=network.eos_ids,
                    response_prefix_ids=prompt.response_prefix_ids,
                    options=request.options or (),
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
            request.mode,
            "stopped at the first answer" if outcome.exited else "went on to the end",
            len(outcome.token_ids),
        )
        self._engine._cache.touch(self)
        yield make_answer(outcome, threshold, usage, request.options or ())

    def _prompt(self, network: "VideoModel", request: AskRequest) -> Prompt:
        return build_prompt(
            network.tokenizer,
            network.family,
            network.config,
            [] if self._vision is None else [self._vision],
            request.text,
            options=request.options,
            kind=request.kind,
            response_prefix=request.response_prefix,
            system=self._engine.system_prompt,
        )

    def _make_room(self, network: "VideoModel", prompt: Prompt, answer_tokens: int) -> int:
        """Make room for a question; the step size with which its prompt is read."""
        engine = self._engine
        return engine._cache.make_room(
            self,
            network,
            prompt,
            answer_tokens=answer_tokens,
            step_size=engine.prefill_step_size,
            kv_bits=engine.kv_bits,
        )

    def _prepare(
        self, network: "VideoModel", prompt: Prompt, step_size: int, should_stop: ShouldStop
    ) -> tuple[Prefix, PrefixCost]:
        """The clip's prefix, computed now if it was not before."""
        if self._prefix is None and self._file is not None:  # its patches are gone
            self._prefix = self._engine._load_prefix(self._file)
        if self._prefix is not None:
            return self._prefix, PrefixCost(0.0, 0.0)
        prefix, cost = Prefix.compute(
            network,
            prompt,
            kv_bits=self._engine.kv_bits,
            step_size=step_size,
            progress=self._progress,
            should_stop=should_stop,
        )
        self._prefix = prefix
        self._engine._cache.touch(self)
        return prefix, cost


def _until(tokens: Iterator[TokenLike], should_stop: ShouldStop) -> Iterator[TokenLike]:
    """Pass tokens on until the work should stop."""
    for token in tokens:
        if should_stop():
            raise Cancelled("the answer was cancelled while it was written")
        yield token
