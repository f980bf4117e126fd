r"""How far a converted model is from its source, measured where it matters: on what the product decides by.

Both models read the same probe prompts and write a first answer, greedily, in an assistant turn that is opened with
``\boxed``, so that a model that was not trained for the protocol answers in a box too. Measured are

- logits, at the last tokens of each prompt and along the source's answer, which the converted model is made to follow:
  their relative error, how often the first choice is the same, and KL(source || converted) in nats. Logits are centred
  on their mean first, since softmax does not see a shift.
- confidence of each model's own first answer, as `mlxvr.confidence` scores it in the product, and how far it drifts,
- exit decisions at the threshold. One has flipped where one model stops with its first answer and the other goes on to
  reason, or where both stop with different answers.

Where one of the two wrote no answer that can be scored (no box, or one that declines to answer), the drift is that of
exp(mean log p) of the source's tokens under both models. Where neither closed a box, there is no exit decision.

The source is read layer by layer (see `layerwise`) and stays in memory as far as the limit allows; then the converted
model takes its place. Both compute in their own dtype, so that what is measured is what a user gets; but on a CPU in
float32, which is many times faster there.
"""

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvr.callbacks import Progress, ShouldStop
from mlxvr.confidence import FirstAnswer, score_first_answer, should_exit
from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.model import memory
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt
from mlxvr.porting import hub
from mlxvr.porting import recipe as recipes
from mlxvr.porting.layerwise import LayerwiseModel, Track
from mlxvr.porting.probes import Probe, budgeted, build_prompts, bundled, load_media
from mlxvr.porting.recipe import Limits
from mlxvr.protocol import DualAnswerParser

__all__ = ["Divergence", "ProbeResult", "VerificationReport", "compare_logits", "verify"]

_OPENING = r"\boxed"
_PROMPT_ROWS = 8  # tokens at the end of a prompt whose logits are compared
_ANSWER_TOKENS = 24  # with those of the opening; a box of two times and its answer has some 16
_MEMORY_SHARE = 0.6  # of the machine's memory, for weights; the rest is for keys, values and everybody else


@dataclass(frozen=True)
class Divergence:
    """How far logits are from those expected, over some tokens.

    Attributes:
        tokens: how many.
        logits_error: mean over tokens of |found - expected| / |expected|, Euclidean, of centred logits.
        largest_error: the largest of them.
        top1: share of tokens whose most likely token is the same.
        kl: mean KL(expected || found) in nats.
    """

    tokens: int
    logits_error: float
    largest_error: float
    top1: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What one probe showed.

    Attributes:
        name: of the probe.
        prompt_tokens: in its prompt.
        divergence: of the logits.
        source_answer, converted_answer: the normalised first answers; None: there is none that can be scored.
        source_confidence, converted_confidence: of the own first answers; of the source's tokens where one is None.
        source_exits, converted_exits: whether each stops there; None: neither closed a box.
    """

    name: str
    prompt_tokens: int
    divergence: Divergence
    source_answer: str | None
    converted_answer: str | None
    source_confidence: float
    converted_confidence: float
    source_exits: bool | None
    converted_exits: bool | None

    @property
    def drift(self) -> float:
        """How far the confidence moved."""
        return abs(self.converted_confidence - self.source_confidence)

    @property
    def answers_differ(self) -> bool:
        """Whether both stop, with different answers."""
        both = bool(self.source_exits and self.converted_exits)
        return both and _folded(self.source_answer) != _folded(self.converted_answer)

    @property
    def flipped(self) -> bool:
        """Whether one stops and the other does not, or both with different answers."""
        return self.source_exits != self.converted_exits or self.answers_differ


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """How far a converted model is from its source.

    Attributes:
        source, converted: the two folders or Hub ids.
        threshold: confidence from which a first answer stands.
        probes: what each probe showed.
        source_run: "in memory", or "layer by layer" with how much of the weights stayed in memory.
        seconds: for all of it.
        peak_memory: the most bytes that MLX's allocator held.
    """

    source: str
    converted: str
    threshold: float
    probes: tuple[ProbeResult, ...]
    source_run: str
    seconds: float
    peak_memory: int

    @property
    def tokens(self) -> int:
        """Tokens whose logits were compared."""
        return sum(probe.divergence.tokens for probe in self.probes)

    @property
    def logits_error(self) -> float:
        """Relative, mean over tokens."""
        return self._over_tokens(lambda one: one.logits_error)

    @property
    def largest_logits_error(self) -> float:
        """Relative, of the worst token."""
        return float(np.max([probe.divergence.largest_error for probe in self.probes]))

    @property
    def top1(self) -> float:
        """Share of tokens whose most likely token is the same."""
        return self._over_tokens(lambda one: one.top1)

    @property
    def kl(self) -> float:
        """KL(source || converted), nats per token."""
        return self._over_tokens(lambda one: one.kl)

    @property
    def confidence_drift(self) -> float:
        """Mean over probes of |converted - source|."""
        return float(np.mean([probe.drift for probe in self.probes]))

    @property
    def largest_confidence_drift(self) -> float:
        """Of the worst probe."""
        return float(np.max([probe.drift for probe in self.probes]))

    @property
    def decisions(self) -> int:
        """Probes on which there is an exit decision."""
        return sum(probe.source_exits is not None for probe in self.probes)

    @property
    def flipped(self) -> tuple[ProbeResult, ...]:
        """Probes whose exit decision flipped."""
        return tuple(probe for probe in self.probes if probe.flipped)

    @property
    def flipped_exits(self) -> float | None:
        """Share of exit decisions that flipped; None: there are none."""
        return len(self.flipped) / self.decisions if self.decisions else None

    @property
    def different_answers(self) -> int:
        """How many of those flipped because both models stop, with different answers."""
        return sum(probe.answers_differ for probe in self.probes)

    def failures(self, limits: Limits) -> tuple[str, ...]:
        """One line for each figure that is beyond its limit, or is no number."""
        found: list[str] = []
        for name, value, limit in (
            ("logits error", self.logits_error, limits.logits_error),
            ("KL", self.kl, limits.kl),
            ("confidence drift", self.confidence_drift, limits.confidence_drift),
            ("share of flipped exit decisions", self.flipped_exits, limits.flipped_exits),
        ):
            if limit is not None and value is not None and not value <= limit:
                found.append(f"{name} is {value:.4g}, the limit is {limit:g}")
        if limits.top1 is not None and not self.top1 >= limits.top1:
            found.append(f"top-1 agreement is {self.top1:.4g}, the limit is {limits.top1:g}")
        return tuple(found)

    def table(self) -> str:
        """A few lines to read."""
        share = self.flipped_exits
        flips = "no decisions" if share is None else f"{len(self.flipped)} of {self.decisions} ({share:.1%})"
        if self.different_answers:
            flips += f", {self.different_answers} by another answer"
        rows = [
            ("logits error, relative", f"{self.logits_error:.4f}", f"largest {self.largest_logits_error:.4f}"),
            ("top-1 agreement", f"{self.top1:.1%}", f"of {self.tokens} tokens"),
            ("KL, nats per token", f"{self.kl:.5f}", ""),
            ("confidence drift", f"{self.confidence_drift:.4f}", f"largest {self.largest_confidence_drift:.4f}"),
            ("exit decisions flipped", flips, f"threshold {self.threshold:g}"),
        ]
        lines = [f"{name:<24}{value:<12}{note}".rstrip() for name, value, note in rows]
        for probe in self.flipped:
            ends = (
                f"{'exits' if exits else 'reasons'} ({answer or 'no answer'}, {confidence:.3f})"
                for exits, answer, confidence in (
                    (probe.source_exits, probe.source_answer, probe.source_confidence),
                    (probe.converted_exits, probe.converted_answer, probe.converted_confidence),
                )
            )
            lines.append(f"  {probe.name}: " + " -> ".join(ends))
        lines.append(
            f"{len(self.probes)} probes, source {self.source_run}, {self.seconds:.1f} s, "
            f"at most {self.peak_memory / 1e9:.2f} GB"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the table of probes included; what is no number is None."""
        probes = []
        for probe in self.probes:
            values = asdict(probe)
            probes.append({**values, **values.pop("divergence"), "drift": probe.drift, "flipped": probe.flipped})
            probes[-1].pop("divergence")
        whole = {
            "source": self.source,
            "threshold": self.threshold,
            "logits_error": self.logits_error,
            "largest_logits_error": self.largest_logits_error,
            "top1": self.top1,
            "kl": self.kl,
            "confidence_drift": self.confidence_drift,
            "largest_confidence_drift": self.largest_confidence_drift,
            "flipped_exits": self.flipped_exits,
            "flipped": len(self.flipped),
            "different_answers": self.different_answers,
            "decisions": self.decisions,
            "tokens": self.tokens,
            "source_run": self.source_run,
            "seconds": round(self.seconds, 1),
            "peak_memory": self.peak_memory,
        }
        return {**_finite(whole), "probes": [_finite(probe) for probe in probes]}

    def _over_tokens(self, figure: Callable[[Divergence], float]) -> float:
        return sum(figure(probe.divergence) * probe.divergence.tokens for probe in self.probes) / self.tokens


def verify(
    source: str | Path,
    converted: str | Path,
    *,
    threshold: float | None = None,
    probes: Sequence[Probe] | None = None,
    memory_limit: int | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> VerificationReport:
    """Compare a converted model with its source; nothing is written.

    Args:
        source, converted: model folders, or Hub ids.
        threshold: confidence from which a first answer stands; None: the converted model's own, else its family's.
        probes: what they are asked; None: `mlxvr.porting.probes.bundled()`.
        memory_limit: bytes that weights may take; None: 60% of the machine's memory.
        dtype: "float32", "float16" or "bfloat16", what both compute in; None: each its own, but float32 on a CPU.
        progress: called with ("verify", done, total).
        should_stop: asked between layers and tokens.

    Raises:
        CheckpointError: a folder cannot be loaded, or the one was not converted from the other.
        ConfigError: there are no probes, or an option has a value that cannot be used.
        Cancelled: `should_stop` said so.
    """
    started = time.perf_counter()
    asked = bundled() if probes is None else list(probes)
    if not asked:
        raise ConfigError("there are no probes to verify with: give at least one, or leave them out")
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"threshold {threshold} is outside [0, 1]: it is compared with a probability")
    limit = _memory_limit() if memory_limit is None else memory_limit
    dtype = memory.fast_dtype() if dtype is None else dtype
    with memory.track_peak() as peak:
        original = _open(source, dtype, limit)
        ours = _open(converted, dtype, limit)
        _check_pair(original.model, ours.model, str(source), str(converted))
        at = _threshold(ours.model) if threshold is None else threshold
        prompts = _ask_both(original.model, ours.model, asked, f"{converted} was not converted from {source}")
        counter = _Counter(progress, 2 * _ANSWER_TOKENS + len(original.model.layers) + len(ours.model.layers))
        source_run = _how(original)
        expected = _read_and_write(original, prompts, counter, should_stop)
        del original
        gc.collect()  # modules hold each other in cycles
        mx.clear_cache()
        scripts = [answer.tokens for answer in expected]
        own: list[_Answer] = []
        found = _read_and_write(ours, prompts, counter, should_stop, scripts=scripts, own=own)
        results = tuple(_judge(*four, at) for four in zip(asked, expected, found, own, strict=True))
        held = peak.bytes
    return VerificationReport(
        source=str(source),
        converted=str(converted),
        threshold=at,
        probes=results,
        source_run=source_run,
        seconds=time.perf_counter() - started,
        peak_memory=held,
    )


def compare_logits(expected: mx.array, found: mx.array) -> Divergence:
    """Compare float32 logits (tokens, vocab), row by row."""
    a, b = (one - one.mean(axis=-1, keepdims=True) for one in (expected, found))
    error = mx.linalg.norm(b - a, axis=-1) / mx.linalg.norm(a, axis=-1)
    log_p, log_q = (one - mx.logsumexp(one, axis=-1, keepdims=True) for one in (a, b))
    kl = (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    same = mx.argmax(a, axis=-1) == mx.argmax(b, axis=-1)
    errors, divergences = np.array(error, dtype=np.float64), np.array(kl, dtype=np.float64)
    return Divergence(
        tokens=len(errors),
        logits_error=float(errors.mean()),
        largest_error=float(errors.max()),
        top1=float(np.array(same).mean()),
        kl=float(divergences.mean()),
    )


@dataclass(eq=False)
class _Answer:
    """A first answer while it is written.

    `row` holds the logits of the next token, `rows` those at the end of the prompt and of every token but the first
    (whose logits are the last of the prompt's).
    """

    model: VideoModel
    track: Track
    row: mx.array
    rows: list[mx.array]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False

    def __post_init__(self) -> None:
        self._parser = DualAnswerParser(self.model.tokenizer.decode)

    @property
    def closed(self) -> bool:
        """Whether the first box is closed."""
        return self._parser.first_closed

    @property
    def scored(self) -> FirstAnswer | None:
        """The answer and its confidence, as the product scores it."""
        return score_first_answer(self.tokens, self.logprobs, self.model.tokenizer.decode)

    def take(self, token: int) -> None:
        """Write a token; the answer ends where the product would stop without reasoning, or at the limit."""
        if self.tokens:
            self.rows.append(self.row[None])
        self.tokens.append(token)
        self.logprobs.append(float((self.row[token] - mx.logsumexp(self.row)).item()))  # type: ignore[arg-type]
        if token in self.model.eos_ids:
            self.ended = True
            return
        self._parser.push(token)
        self.ended = self.closed or self._parser.stage == "reasoning" or len(self.tokens) >= _ANSWER_TOKENS

    def fork(self) -> "_Answer":
        """Another answer that begins with these tokens."""
        forked = _Answer(self.model, self.track.fork(), self.row, [], list(self.tokens), list(self.logprobs))
        for token in self.tokens:
            forked._parser.push(token)
        return forked


def _read_and_write(
    model: LayerwiseModel,
    prompts: Sequence[Prompt],
    counter: "_Counter",
    should_stop: ShouldStop | None,
    *,
    scripts: Sequence[Sequence[int]] | None = None,
    own: list[_Answer] | None = None,
) -> list[_Answer]:
    """Read the prompts and write an answer to each, all in lock-step.

    `scripts` says what to write instead of the model's own choices, which `own` then gets: the same answer as long as
    the two agree, and from there on one that goes its own way.
    """
    opening = model.model.tokenizer.encode(_OPENING)
    done = counter.done
    tracks, logits = model.read(prompts, last=_PROMPT_ROWS, progress=counter.layer, should_stop=should_stop)
    answers = [_Answer(model.model, track, rows[-1], [rows]) for track, rows in zip(tracks, logits)]
    apart: dict[int, _Answer] = {}

    def choose(answer: _Answer) -> int:
        place = len(answer.tokens)
        return opening[place] if place < len(opening) else int(mx.argmax(answer.row).item())  # type: ignore[arg-type]

    def follow(answer: _Answer) -> int:
        index = answers.index(answer)
        assert scripts is not None
        token = scripts[index][len(answer.tokens)]
        if index not in apart and token != choose(answer):
            apart[index] = answer.fork()
        return token

    _write(model, answers, choose if scripts is None else follow, counter, should_stop)
    _write(model, list(apart.values()), choose, None, should_stop)
    if own is not None:
        own += [apart.get(index, answer) for index, answer in enumerate(answers)]
    counter.jump(done + len(model.model.layers) + _ANSWER_TOKENS)
    return answers


def _write(
    model: LayerwiseModel,
    answers: Sequence[_Answer],
    choose: Callable[[_Answer], int],
    counter: "_Counter | None",
    should_stop: ShouldStop | None,
) -> None:
    """Write token by token until every answer has ended."""
    while going := [answer for answer in answers if not answer.ended]:
        for answer in going:
            answer.take(choose(answer))
        if going := [answer for answer in going if not answer.ended]:
            tracks, tokens = [answer.track for answer in going], [answer.tokens[-1] for answer in going]
            for answer, row in zip(going, model.step(tracks, tokens, should_stop=should_stop)):
                answer.row = row
        if counter is not None:
            counter.jump(counter.done + 1)


def _judge(probe: Probe, source: _Answer, forced: _Answer, own: _Answer, threshold: float) -> ProbeResult:
    """Compare what the source wrote with the same tokens in the converted model, and with that one's own answer."""
    theirs, ours = source.scored, own.scored
    decided = source.closed or own.closed
    if theirs is not None and ours is not None:
        confidences = theirs.confidence, ours.confidence
    else:
        start = len(source.model.tokenizer.encode(_OPENING))
        confidences = _certainty(source.logprobs[start:]), _certainty(forced.logprobs[start:])
    return ProbeResult(
        name=probe.name,
        prompt_tokens=len(source.track.prompt.ids),
        divergence=compare_logits(mx.concatenate(source.rows), mx.concatenate(forced.rows)),
        source_answer=None if theirs is None else theirs.text,
        converted_answer=None if ours is None else ours.text,
        source_confidence=confidences[0],
        converted_confidence=confidences[1],
        source_exits=should_exit(theirs, threshold) if decided else None,
        converted_exits=should_exit(ours, threshold) if decided else None,
    )


class _Counter:
    """Tells progress, in layers of the prompts' pass and in answer tokens."""

    def __init__(self, progress: Progress | None, total: int):
        self.done = 0
        self._progress = progress
        self._total = total

    def layer(self, _: str, __: int, ___: int) -> None:
        self.jump(self.done + 1)

    def jump(self, done: int) -> None:
        self.done = done
        if self._progress is not None:
            self._progress("verify", done, self._total)


def _open(model: str | Path, dtype: str | None, memory_limit: int) -> LayerwiseModel:
    """The one place that says where weights come from."""
    return LayerwiseModel.open(hub.resolve(model), dtype=dtype, memory_limit=memory_limit)


def _check_pair(source: VideoModel, converted: VideoModel, source_name: str, converted_name: str) -> None:
    """Refuse models that cannot be source and conversion of each other."""
    wrong, advice = (
        f"{converted_name} was not converted from {source_name}",
        "give the checkpoint that it was made from",
    )
    if source.family.name != converted.family.name:
        raise CheckpointError(f"{wrong}: it is a {converted.family.name}, that a {source.family.name}; {advice}")
    theirs, ours = (model.family.expected_shapes(model.config) for model in (source, converted))
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            sizes = (f"{list(shapes[key])}" if key in shapes else "missing" for shapes in (ours, theirs))
            raise CheckpointError(f"{wrong}: {key} is {' there and '.join(sizes)} in the source; {advice}")
    if source.tokenizer.vocabulary_size != converted.tokenizer.vocabulary_size or source.eos_ids != converted.eos_ids:
        raise CheckpointError(f"{wrong}: its tokenizer is another one; {advice}")


def _ask_both(source: VideoModel, converted: VideoModel, probes: Sequence[Probe], wrong: str) -> list[Prompt]:
    """The prompts, which must be the same for both models; media are shown as the converted model sees them."""
    geometry = ("patch_size", "merge_size", "temporal_patch_size", "mean", "std")
    for name in geometry:
        if getattr(source.spec, name) != getattr(converted.spec, name):
            raise CheckpointError(f"{wrong}: its processor files differ in {name}; copy them from the source")
    spec = converted.spec.with_overrides(**converted.settings.get("budgets", {}))
    media = load_media(probes, budgeted(spec))
    prompts = build_prompts(converted, probes, media)
    for ours, theirs in zip(prompts, build_prompts(source, probes, media)):
        if not np.array_equal(ours.ids, theirs.ids) or not np.array_equal(ours.positions, theirs.positions):
            raise CheckpointError(f"{wrong}: its tokenizer, chat template or positions are others; convert it again")
    return prompts


def _threshold(model: VideoModel) -> float:
    own = model.settings.get("threshold")
    return float(recipes.for_config(model.config).threshold if own is None else own)


def _how(model: LayerwiseModel) -> str:
    if model.resident:
        return "in memory"
    return f"layer by layer, {model.kept_bytes / 1e9:.1f} of {model.nbytes / 1e9:.1f} GB in memory"


def _memory_limit() -> int:
    """Bytes that weights may take on this machine."""
    info = mx.device_info()
    whole = info.get("memory_size") or info.get("total_memory") or 0
    return int(_MEMORY_SHARE * (int(whole) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))


def _certainty(logprobs: Sequence[float]) -> float:
    return math.exp(min(0.0, sum(logprobs) / len(logprobs)))


def _folded(answer: str | None) -> str:
    return " ".join((answer or "").casefold().split())


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
