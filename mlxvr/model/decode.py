"""Prefill and decoding, in tokens: this module knows no text.

`prefill` reads ids into a cache and returns the logits of the next token; `decode` continues from there, one token at a
time. Both append to what the cache already holds.

Decoding runs one token ahead: while a caller handles a token, the network already reads it, so that the device never
waits for Python. A caller that stops has wasted one forward pass; a caller that continues on the same iterator has
computed nothing twice. After any number of tokens, and also once the iterator is closed or has failed, the cache holds
its former tokens and every token that was yielded.

Visual placeholders are never written (`VideoModel.suppress_tokens`): `suppression` is added to the logits before a
token is chosen, here, in rollouts and in probes. Log-probabilities are still those of the model's whole distribution,
as the training pass computes them; where the placeholders have negligible probability, nothing changes.

Logits that are not finite raise an error at the first token that is chosen from them, since its log-probability, and
then a confidence, would not be a number. float16 ends at 65,504, and activations of Qwen's models exceed that.
"""

import math
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvr.errors import Cancelled, CheckpointError, ConfigError, MlxvrError
from mlxvr.model import cache as kv
from mlxvr.model.memory_plan import step_limit
from mlxvr.model.network import VideoModel, VisionFeatures
from mlxvr.runtime.device_memory import backend
from mlxvr.runtime.hooks import Progress, ShouldStop

__all__ = ["Decoder", "Sampler", "Token", "decode", "not_finite", "prefill", "suppression"]


_LONG_STEP = 512  # tokens; from here on, skipping a layer's work is worth an extra pass for one token
_TOKENS_BETWEEN_CLEARINGS = 256  # MLX keeps freed buffers; mlx-lm clears them as often


@dataclass(frozen=True)
class Token:
    """A decoded token.

    Attributes:
        id: the token's id.
        logprob: natural log of its probability under the model's own distribution, however it was sampled.
    """

    id: int
    logprob: float


class Sampler:
    """Samples tokens at a temperature, from the smallest set of tokens that has `top_p` of the probability.

    It has its own random state, so that a seed gives the same tokens whatever else runs.
    """

    def __init__(self, temperature: float = 1.0, *, top_p: float = 1.0, seed: int | None = None):
        """Raises `ConfigError` for a temperature that is not positive or a `top_p` outside (0, 1]."""
        if not 0.0 < temperature < float("inf"):
            raise ConfigError(
                f"temperature {temperature} cannot be used for sampling: use a positive number, or decode greedily"
            )
        if not 0.0 < top_p <= 1.0:
            raise ConfigError(f"top_p {top_p} is outside (0, 1]: 1 keeps every token")
        self.temperature = temperature
        self.top_p = top_p
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        self._key = mx.random.key(seed)

    def __call__(self, logits: mx.array) -> mx.array:
        """Sample from float32 logits (.., vocab): ids (..)."""
        self._key, key = mx.random.split(self._key)
        scaled = logits / self.temperature
        if self.top_p < 1.0:
            scaled = self._keep_nucleus(scaled)
        return mx.random.categorical(scaled, key=key)

    def _keep_nucleus(self, scaled: mx.array) -> mx.array:
        """Exclude tokens beyond `top_p` in the order of falling probability; the first token always stays."""
        order = mx.argsort(-scaled, axis=-1)
        sorted_probabilities = mx.take_along_axis(mx.softmax(scaled, axis=-1), order, axis=-1)
        before = mx.cumsum(sorted_probabilities, axis=-1) - sorted_probabilities
        rank = mx.argsort(order, axis=-1)
        keep = mx.take_along_axis(before < self.top_p, rank, axis=-1)
        return mx.where(keep, scaled, -mx.inf)


def prefill(
    model: VideoModel,
    prompt_ids: np.ndarray,
    positions: np.ndarray,
    cache: list[Any],
    *,
    features: VisionFeatures | None = None,
    media_mask: np.ndarray | None = None,
    step_size: int = 2048,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> mx.array:
    """Read tokens into a cache, after the tokens that it already holds.

    Args:
        model: the network to run.
        prompt_ids: int32 (n,), at least one.
        positions: int32 (3, n).
        cache: is extended by n tokens; when the work is cancelled, it holds the tokens that were read until then.
        features: of the visual tokens among `prompt_ids`, in order.
        media_mask: bool (n,), True for visual tokens.
        step_size: the most tokens that go through the network at once; bounds the memory. After a long context the
            limit is lower, see `memory_plan.step_limit`.
        progress: called with ("prefill", tokens done, n).
        should_stop: asked before each step.

    Returns:
        Logits of the next token, float32 (vocab,), not yet evaluated.

    Raises:
        ConfigError: the prompt is empty, or `step_size` is not positive.
        Cancelled: `should_stop` returned True.
    """
    total = len(prompt_ids)
    if total == 0:
        raise ConfigError("the prompt is empty: at least one token is needed")
    if step_size < 1:
        raise ConfigError(f"the prefill step size is {step_size}: use a positive number of tokens, such as 2048")
    mask = np.zeros(total, dtype=bool) if media_mask is None else media_mask
    seen = np.concatenate([[0], np.cumsum(mask)])  # number of visual tokens before each token
    if features is not None and len(features) != seen[-1]:
        raise ValueError(f"{len(features)} rows of visual features for {seen[-1]} visual tokens")
    held, is_fused = kv.length(cache), backend() != "cpu" and not kv.is_quantized(cache)

    def size_at(start: int) -> int:
        return min(step_size, step_limit(model.config, held + start, is_fused=is_fused))

    for start, end in pairwise(_steps(total, size_at)):
        if should_stop is not None and should_stop():
            raise Cancelled("the prompt was cancelled while the model read it")
        own = features[int(seen[start]) : int(seen[end])] if features is not None and seen[end] > seen[start] else None
        hidden = model.hidden(
            mx.array(prompt_ids[start:end])[None],
            mx.array(positions[:, start:end])[:, None],
            cache=cache,
            features=own,
            media_mask=mask[None, start:end],
        )
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        if progress is not None:
            progress("prefill", end, total)
    return model.logits(hidden[:, -1])[0]


def suppression(model: VideoModel, suppress_tokens: Collection[int] | None = None) -> mx.array:
    """An array to add to logits before a token is chosen: float32 (vocab,), -inf for suppressed tokens, 0 for others.

    `suppress_tokens`: None: the model's own; (): none.
    """
    added = np.zeros(int(model.config["text_config"]["vocab_size"]), dtype=np.float32)
    added[sorted(model.suppress_tokens if suppress_tokens is None else suppress_tokens)] = -np.inf
    return mx.array(added)


def not_finite(model: VideoModel) -> MlxvrError:
    """The error for logits that are not finite; names the dtype of the computation."""
    dtype = str(model.dtype).rpartition(".")[2]
    if dtype == "float16":
        return ConfigError(
            "the logits are not finite: float16 overflowed (it ends at 65504): use --dtype bfloat16 or float32"
        )
    advice = "" if dtype == "float32" else "use --dtype float32, or "
    return CheckpointError(
        f"the logits are not finite in {dtype}: {advice}get the checkpoint again, its weights may be damaged"
    )


def _steps(total: int, size_at: Callable[[int], int]) -> list[int]:
    """The edges of the steps; `size_at(start)` is the longest step from a start.

    The last token of a long last step becomes a step of its own. A step is evaluated through its keys and values, which
    do not need the last layer's attention output and MLP. Only a step whose hidden states are used computes these: for
    one token that is cheaper than for all.
    """
    edges = [0]
    while edges[-1] < total:
        edges.append(min(total, edges[-1] + size_at(edges[-1])))
    if edges[-1] - edges[-2] > _LONG_STEP:
        edges.insert(-1, total - 1)
    return edges


class Decoder:
    """Decodes one token at a time and can continue at any time; usually used through `decode`.

    Attributes:
        position: rope position of the token that `logits` predict.
        logits: float32 (vocab,), not yet evaluated: of the token after all that were yielded.
    """

    def __init__(
        self,
        model: VideoModel,
        logits: mx.array,
        cache: list[Any],
        position: int,
        *,
        sampler: Sampler | None = None,
        suppress_tokens: Collection[int] | None = None,
    ):
        """Begin after the tokens in `cache`; see `decode` for the arguments."""
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._suppression = suppression(model, suppress_tokens)
        self.position = position
        self._handed_out = 0
        self._choose(logits)

    def __iter__(self) -> "Decoder":
        return self

    def __next__(self) -> Token:
        """The next token; by the time it is returned, the network is already reading it.

        Raises `ConfigError` or `CheckpointError` when the logits are not finite, see `not_finite`.
        """
        choice, logprob = self._choice, self._logprob
        hidden = self._model.hidden(
            choice.reshape(1, 1), mx.full((3, 1, 1), self.position, dtype=mx.int32), cache=self._cache
        )
        self.position += 1
        self._choose(self._model.logits(hidden[:, -1])[0])
        self._handed_out += 1
        if self._handed_out % _TOKENS_BETWEEN_CLEARINGS == 0:
            mx.clear_cache()
        token = Token(int(choice.item()), float(logprob.item()))  # type: ignore[arg-type]
        if not math.isfinite(token.logprob):  # NaN or infinity in any logit reaches it through the sum
            raise not_finite(self._model)
        return token

    def _choose(self, logits: mx.array) -> None:
        """Choose the next token on the device, without waiting for it."""
        self.logits = logits
        allowed = logits + self._suppression
        self._choice = mx.argmax(allowed) if self._sampler is None else self._sampler(allowed)
        self._logprob = logits[self._choice] - mx.logsumexp(logits)
        mx.async_eval(self._choice, self._logprob)


def decode(
    model: VideoModel,
    logits: mx.array,
    cache: list[Any],
    position: int,
    *,
    max_tokens: int,
    sampler: Sampler | None = None,
    suppress_tokens: Collection[int] | None = None,
    stop_ids: Collection[int] = (),
) -> Generator[Token, None, None]:
    """Generate tokens up to `max_tokens`, or to a token of `stop_ids`, which is also yielded.

    To stop early, do not take the next token. Once the iterator is closed, the cache holds its former tokens and every
    token that was yielded.

    Args:
        model: the network to run.
        logits: of the first token, as `prefill` returns them.
        cache: the context; is extended.
        position: rope position of the first token (`Prompt.next_position`).
        max_tokens: the most tokens.
        sampler: None: decode greedily.
        suppress_tokens: tokens that are never chosen; log-probabilities of the other tokens do not change. None: the
            model's own.
        stop_ids: tokens that end the answer.

    Raises `ConfigError` (float16 overflowed) or `CheckpointError` when the logits are not finite.
    """
    held = kv.length(cache)
    handed_out = 0
    decoder = Decoder(model, logits, cache, position, sampler=sampler, suppress_tokens=suppress_tokens)
    try:
        while handed_out < max_tokens:
            token = next(decoder)
            handed_out += 1
            yield token
            if token.id in stop_ids:
                return
    finally:
        kv.trim(cache, held + handed_out)
