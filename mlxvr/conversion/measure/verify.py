r"""Verification of a converted model against its source, on the quantities that decide its answers.

Both models read the same probe prompts and write a first answer greedily, in an assistant turn that begins with
``\boxed``, so that a model that was not trained for the protocol also answers in a box. Three things are measured:

- Logits, at the last tokens of each prompt and along the source's answer, which the converted model is made to follow:
  their relative error, how often the first choice is the same, and KL(source || converted) in nats. Logits are centred
  on their mean first, since softmax does not see a shift.
- Confidence of each model's own first answer, as `mlxvr.answering.confidence` scores it in the product, and its drift.
- Exit decisions at the threshold. A decision has flipped where only one of the models stops with its first answer and
  the other reasons, or where both stop with different answers.

Where either model wrote no answer that can be scored (no box, or a box that declines to answer), the drift is that of
exp(mean log p) of the source's tokens under both models. Where neither closed a box, there is no exit decision.

The source is read layer by layer (see `layerwise`) and stays in memory as far as the limit allows; then the converted
model takes its place. Both compute in their own dtype, so that users get what is measured; on a CPU they compute in
float32, which is many times faster there.
"""

import gc
import math
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxvr.answering.confidence import should_exit
from mlxvr.checkpoint import hub
from mlxvr.checkpoint.defaults import Defaults
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.conversion.measure.first_answers import MOST_TOKENS, Draft, choose_greedily, opening, write_answers
from mlxvr.conversion.measure.layerwise import LayerwiseModel, default_weights_limit
from mlxvr.conversion.measure.probes import Probe, budgeted, build_prompts, bundled, load_media
from mlxvr.conversion.measure.verification import ProbeResult, VerificationReport, compare_logits
from mlxvr.errors import CheckpointError, ConfigError
from mlxvr.model.decode import suppression
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt
from mlxvr.runtime import device_memory
from mlxvr.runtime.device_lock import use_device
from mlxvr.runtime.hooks import Progress, ShouldStop

__all__ = ["VerificationReport", "verify"]

_PROMPT_ROWS = 8  # tokens at the end of a prompt whose logits are compared


@use_device()
def verify(  # 8 parameters: keywords that users write
    source: str | Path | ModelFolder,
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
        source, converted: model folders or Hub ids; the source may also be an open folder, with its own key rules.
        threshold: confidence from which a first answer is taken; None: the converted model's own, else its family's.
        probes: the questions; None: `mlxvr.conversion.measure.probes.bundled()`.
        memory_limit: bytes that weights may take; None: `layerwise.default_weights_limit()`.
        dtype: "float32", "float16" or "bfloat16", in which both compute; None: each in its own, or float32 on a CPU.
        progress: called with ("verify", done, total).
        should_stop: asked between layers and tokens.

    Raises:
        CheckpointError: a folder cannot be loaded, or `converted` was not converted from `source`.
        ConfigError: there are no probes, an option has a value that cannot be used, or float16 overflowed.
        Cancelled: `should_stop` returned True.
    """
    started = time.perf_counter()
    asked = bundled() if probes is None else list(probes)
    if not asked:
        raise ConfigError("there are no probes to verify with: give at least one, or leave `probes` out")
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"threshold {threshold} is outside [0, 1]: it is compared with a probability")
    limit = default_weights_limit() if memory_limit is None else memory_limit
    named = str(source.path if isinstance(source, ModelFolder) else source)
    dtype = device_memory.fast_dtype() if dtype is None else dtype
    with device_memory.track_peak() as peak:
        original = _open(source, dtype, limit)
        ours = _open(converted, dtype, limit)
        _check_pair(original.model, ours.model, named, str(converted))
        assert ours.model.folder is not None, "made by load_model"
        defaults = Defaults.of(ours.model.folder)
        threshold = defaults.threshold if threshold is None else threshold
        prompts = _ask_both(original.model, ours.model, defaults, asked, f"{converted} was not converted from {named}")
        counter = _Counter(progress, 2 * MOST_TOKENS + len(original.model.layers) + len(ours.model.layers))
        source_run = _how(original)
        expected = _read_and_write(original, prompts, counter, should_stop)
        del original
        gc.collect()  # modules hold each other in cycles
        mx.clear_cache()
        scripts = [answer.tokens for answer in expected]
        own: list[Draft] = []
        forced = _read_and_write(ours, prompts, counter, should_stop, scripts=scripts, own=own)
        results = tuple(_judge(*drafts, threshold) for drafts in zip(asked, expected, forced, own, strict=True))
        peak_memory = peak.bytes
    return VerificationReport(
        source=named,
        converted=str(converted),
        threshold=threshold,
        probes=results,
        source_run=source_run,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory,
    )


def _read_and_write(
    model: LayerwiseModel,
    prompts: Sequence[Prompt],
    counter: "_Counter",
    should_stop: ShouldStop | None,
    *,
    scripts: Sequence[Sequence[int]] | None = None,
    own: list[Draft] | None = None,
) -> list[Draft]:
    """Read the prompts and write an answer to each, all in lock-step.

    `scripts` are tokens to write instead of the model's own choices. The model's own answers then go to `own`: the same
    draft while both agree, and a fork of it from the first token that differs.
    """
    done = counter.done
    tracks, logits = model.read(prompts, last=_PROMPT_ROWS, progress=counter.layer, should_stop=should_stop)
    suppressed = suppression(model.model)
    tokenizer = model.model.tokenizer
    answers = [Draft(tokenizer, track, suppressed, rows[-1], [rows]) for track, rows in zip(tracks, logits)]
    forks: dict[int, Draft] = {}

    def follow(answer: Draft) -> int:
        index = answers.index(answer)
        assert scripts is not None
        token = scripts[index][len(answer.tokens)]
        if index not in forks and token != choose_greedily(answer):
            forks[index] = answer.fork()
        return token

    choose = choose_greedily if scripts is None else follow
    write_answers(model, answers, choose, on_token=counter.step, should_stop=should_stop)
    write_answers(model, list(forks.values()), should_stop=should_stop)
    for answer in (*answers, *forks.values()):
        answer.track.cache = []
    if own is not None:
        own += [forks.get(index, answer) for index, answer in enumerate(answers)]
    counter.jump(done + len(model.model.layers) + MOST_TOKENS)
    return answers


def _judge(probe: Probe, source: Draft, forced: Draft, own: Draft, threshold: float) -> ProbeResult:
    """Compare the source's answer with the same tokens in the converted model, and with that model's own answer."""
    theirs, ours = source.scored, own.scored
    decided = source.closed or own.closed
    if theirs is not None and ours is not None:
        confidences = theirs.confidence, ours.confidence
    else:
        start = len(opening(source.tokenizer))
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
    """Reports progress, in layers of the prompts' pass and in answer tokens."""

    def __init__(self, progress: Progress | None, total: int):
        self.done = 0
        self._progress = progress
        self._total = total

    def layer(self, _: str, __: int, ___: int) -> None:
        self.step()

    def step(self) -> None:
        self.jump(self.done + 1)

    def jump(self, done: int) -> None:
        self.done = done
        if self._progress is not None:
            self._progress("verify", done, self._total)


def _open(model: str | Path | ModelFolder, dtype: str | None, memory_limit: int) -> LayerwiseModel:
    """Open a folder, or a Hub id; both models are opened here."""
    folder = model if isinstance(model, ModelFolder) else hub.resolve(model)
    return LayerwiseModel.open(folder, dtype=dtype, memory_limit=memory_limit)


def _check_pair(source: VideoModel, converted: VideoModel, source_name: str, converted_name: str) -> None:
    """Raise `CheckpointError` unless one model can be the conversion of the other."""
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
        raise CheckpointError(f"{wrong}: its tokenizer is a different one; {advice}")


def _ask_both(
    source: VideoModel, converted: VideoModel, defaults: Defaults, probes: Sequence[Probe], wrong: str
) -> list[Prompt]:
    """The prompts, which must be the same for both models; tokenizer and frame rules are the converted model's."""
    geometry = ("patch_size", "merge_size", "temporal_patch_size", "mean", "std")
    for name in geometry:
        if getattr(source.spec, name) != getattr(converted.spec, name):
            raise CheckpointError(f"{wrong}: its processor files differ in {name}; copy them from the source")
    media = load_media(probes, budgeted(defaults.spec))
    prompts = build_prompts(converted, probes, media, system=defaults.system_prompt)
    for ours, theirs in zip(prompts, build_prompts(source, probes, media, system=defaults.system_prompt)):
        if not np.array_equal(ours.ids, theirs.ids) or not np.array_equal(ours.positions, theirs.positions):
            raise CheckpointError(f"{wrong}: its tokenizer, chat template or positions differ; convert it again")
    return prompts


def _how(model: LayerwiseModel) -> str:
    if model.resident:
        return "in memory"
    return f"layer by layer, {model.kept_bytes / 1e9:.1f} of {model.nbytes / 1e9:.1f} GB in memory"


def _certainty(logprobs: Sequence[float]) -> float:
    return math.exp(min(0.0, sum(logprobs) / len(logprobs)))
