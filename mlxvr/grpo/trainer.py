"""A training run, from its settings to an adapter: `train(config)`.

    output/
      adapters.safetensors, adapter_config.json     the adapter as it was last saved
      best/                                         the adapter with the highest reward on the validation rows
      train_config.toml                             the settings
      metrics.jsonl                                 the figures of each step
      state/                                        what `--resume` needs

A step decides everything from the seed, its number and the rows' ids; so a run that was killed and resumed ends with
the same bits as one that was not. Two things remain outside that: a formula that takes `math-verify` just about its
limit of processor time (see `mlxvr.grading.math_equality`), and a reward function of the user's own that is not a
function of its arguments alone. Several ranks go through the same steps, each with its share of the rows; rank 0
alone writes.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from typing import Any

import mlx.core as mx

from mlxvr import __version__
from mlxvr.cli.plotting import check_plot
from mlxvr.cli.settings import settings_of, write_settings
from mlxvr.data.prefetch import read_ahead
from mlxvr.data.rows import Row, to_record
from mlxvr.errors import ConfigError, DataError, MediaError
from mlxvr.grading.reward import RewardFunction, load_reward
from mlxvr.grpo.collapse_guard import CollapseGuard, GroupAnswer
from mlxvr.grpo.data_order import batches
from mlxvr.grpo.filtering import FilterReport, Sampling, filter_rows
from mlxvr.grpo.monitor.curves import plot_curves
from mlxvr.grpo.monitor.metrics_log import FILE_NAME, MetricsLog
from mlxvr.grpo.monitor.sinks import make_sinks
from mlxvr.grpo.monitor.step_metrics import step_metrics, summarise_group
from mlxvr.grpo.monitor.train_report import TrainReport
from mlxvr.grpo.prompt_lengths import measure_prompts
from mlxvr.grpo.schedule import learning_rate
from mlxvr.grpo.setup import (
    check_lengths,
    check_output,
    check_rows,
    default_threshold,
    estimate_memory,
    frame_spec,
    identity,
    load,
    read_training_rows,
    read_validation_rows,
    reward_weights,
)
from mlxvr.grpo.shared_state import check_same, have_same_bits, shared_state
from mlxvr.grpo.step.lora import adapter_digest, adapter_state, attach, attach_saved, lora_weights, save_adapter
from mlxvr.grpo.step.policy_update import NotFinite, PolicyUpdater, ScoredGroup
from mlxvr.grpo.step.prompts import encode_row
from mlxvr.grpo.step.reward_model import RewardModel
from mlxvr.grpo.step.rollout import rollout
from mlxvr.grpo.train_config import TrainConfig, idle_options
from mlxvr.grpo.train_state import TrainState, load_state, read_state, save_state, state_file
from mlxvr.grpo.validation import ValidatedRow, summarise, validate_answer
from mlxvr.media.spec import VisionSpec
from mlxvr.model.network import VideoModel
from mlxvr.runtime import device_memory
from mlxvr.runtime.device_lock import hand_over, use_device
from mlxvr.runtime.distributed import ProcessGroup
from mlxvr.runtime.hooks import Progress as Bar
from mlxvr.runtime.hooks import ShouldStop
from mlxvr.storage.atomic import replace_file
from mlxvr.storage.paths import list_all

__all__ = ["train"]

OnEntry = Callable[[Mapping[str, Any], int], None]
OnNote = Callable[[str], None]
_SETTINGS_FILE = "train_config.toml"


def train(
    config: TrainConfig,
    *,
    progress: Bar | None = None,
    on_entry: OnEntry | None = None,
    on_note: OnNote | None = None,
    should_stop: ShouldStop | None = None,
) -> TrainReport | FilterReport:
    """Fine-tune a model with GRPO; goes on where an earlier run stopped if `config.resume`.

    Args:
        config: what to do.
        progress: called with (stage, done, total): "download", "check", "filter", "sample" (rows of a step), "learn"
            (0 of 1: a step is learned from) and "validate".
        on_entry: called with each entry of `metrics.jsonl` and the number of steps in all, on rank 0.
        on_note: called with what is worth a line for people, on rank 0.
        should_stop: asked between steps and between validation rows; the run then saves its state and returns.

    Returns:
        What was done; for `config.filter_only` what was kept.

    Raises:
        ConfigError: a setting cannot be used, the output is another run's, a rank is gone, or training without labels
            has collapsed (the step that told so is saved). What was last saved can be gone on from.
        DataError: a row cannot be used, or a loss is not a finite number.
        CheckpointError: the model, adapter or state cannot be loaded.
        OutOfMemoryError: the run would not fit.
    """
    ranks = ProcessGroup()  # before anything that only one of them may lack, so that the others notice
    if config.filter_only and ranks.size > 1:
        raise ConfigError(f"filter_only is for one process, and these are {ranks.size} ranks: start it without them")
    if config.plot is not None:
        check_plot(config.plot)
    own = None if config.own_reward is None else load_reward(config.own_reward)
    rows, left_out = read_training_rows(config)
    valid = read_validation_rows(config)
    note = on_note if on_note is not None and ranks.rank == 0 else _silent
    for reason in left_out[:5]:
        note(f"left out: {reason}")
    if len(left_out) > 5:
        note(f"left out: {len(left_out) - 5} rows more, {len(left_out)} in all")
    for reason, names in idle_options(config).items():
        flags = ", ".join(settings_of(TrainConfig)[name].flag for name in names)
        note(f"without effect: {flags}, as {reason}")
    if ranks.rank == 0:
        check_output(config)
    check_rows(config, [*rows, *valid])
    model = load(config, progress)
    report: TrainReport | FilterReport
    with use_device(), device_memory.wired(), device_memory.limited(config.memory_limit):
        if config.filter_only:
            report = _filter(config, model, rows, own, note, progress, should_stop)
        else:
            run = _Run(config, model, rows, valid, ranks, own, note)
            report = run.go(progress=progress, on_entry=on_entry, should_stop=should_stop)
    return dataclasses.replace(report, left_out=len(left_out))


class _Run:
    """A run's parts, and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        model: VideoModel,
        rows: Sequence[Row],
        valid: Sequence[Row],
        ranks: ProcessGroup,
        own: RewardFunction | None,
        note: OnNote,
    ) -> None:
        self.config, self.model, self.rows, self.valid, self.ranks = config, model, rows, valid, ranks
        self.own = own
        self.warnings: list[str] = []
        self._note = note
        self.spec = frame_spec(config, model)
        self.threshold = default_threshold(model) if config.threshold is None else config.threshold
        self.weights = reward_weights(config)
        fingerprint = model.fingerprint
        if config.adapter is None:
            self.lora = config.lora
            attach(model, self.lora, seed=config.seed)
            reference = None
        else:
            self.lora = attach_saved(model, config.adapter)
            reference = adapter_state(model)
        reward_model = RewardModel(
            weights=self.weights, own=own, label_free=config.label_free, temperature=config.temperature
        )
        self.updater = PolicyUpdater(model, config, reward_model, ranks, reference=reference)
        self.guard = CollapseGuard()
        self.collapse: ConfigError | None = None  # what the guard ends the run with, once the step is saved
        per_epoch = len(batches(len(rows), batch_size=config.batch_size, seed=0, epoch=0))
        self.total = config.steps or per_epoch * config.epochs
        self._check_memory()
        self.state = TrainState(run=identity(config, model, fingerprint, rows, self.total))
        check_same(ranks, {**self.state.run, **self._pace()})
        self.goes_on = config.resume and self._resume()
        if self.valid and own is not None:
            self._note(f"validation rewards, and so which adapter is best, are those of {config.own_reward}")

    def _check_memory(self) -> None:
        """Refuse prompts that are too long and steps that cannot fit, and say what a step needs."""
        _check_sizes(self.config, self.model, self.rows, self.spec, self._note, ranks=self.ranks.size)

    def _pace(self) -> dict[str, Any]:
        """What the ranks do together and when, beside what decides the steps."""
        config = self.config
        valid = json.dumps([to_record(row, media=row.media) for row in self.valid], sort_keys=True)
        return {
            "resume": config.resume,
            "steps": self.total,
            "save_every": config.save_every,
            "valid_every": config.valid_every,
            "validation rows": hashlib.sha256(valid.encode()).hexdigest()[:16],
            "mlxvr": __version__,
            "mlx": version("mlx"),
        }

    def _resume(self) -> bool:
        """Take up the saved state; False for one that has done no step, with other settings: the run begins anew."""
        asked = self.state.run
        with shared_state(self.ranks, self.config.output) as folder:
            saved = read_state(folder)
            different = [
                name for name in sorted(asked.keys() | saved.run.keys()) if asked.get(name) != saved.run.get(name)
            ]
            if different and saved.step == 0:
                return False
            self.state, self.updater.reference = load_state(folder, self.model, self.updater.optimizer)
        if different:
            name = different[0]
            raise ConfigError(
                f"{self.config.output} was begun with {name} {saved.run.get(name)!r}, and now it is "
                f"{asked.get(name)!r}: give what it was begun with, or start a run in another folder"
            )
        if self.state.guard:
            self.guard.restore(self.state.guard)
        return True

    def go(self, *, progress: Bar | None, on_entry: OnEntry | None, should_stop: ShouldStop | None) -> TrainReport:
        """All steps that are left.

        A run that ends before its first step leaves no run behind: the next one may begin in the same folder.
        """
        output = self.config.output
        made = [path for path in (output / _SETTINGS_FILE, output / FILE_NAME) if not path.exists()]
        made_folder = not output.exists()
        try:
            return self._go(progress=progress, on_entry=on_entry, should_stop=should_stop)
        finally:
            if self.ranks.rank == 0 and self.state.step == 0 and not state_file(output).exists():
                for path in made:
                    path.unlink(missing_ok=True)
                if made_folder and output.is_dir() and not list_all(output):
                    output.rmdir()

    def _go(self, *, progress: Bar | None, on_entry: OnEntry | None, should_stop: ShouldStop | None) -> TrainReport:
        config, state = self.config, self.state
        started = time.perf_counter()
        figures: Mapping[str, Any] = {}
        valid: dict[int, Mapping[str, Any]] = {}
        stopped = False
        with ExitStack() as stack:
            metrics_log = self._open_log(stack)

            def write(entry: Mapping[str, Any]) -> None:
                if metrics_log is not None:
                    metrics_log.write(entry)
                    if on_entry is not None:
                        on_entry(entry, self.total)

            def validate() -> bool:
                """Measure after a step that is saved, and write its entry; False when that was stopped."""
                found = self.validate(progress, should_stop) if self.valid else {}
                if found is None:
                    return False
                if found:
                    valid[state.step] = found
                    if state.step:
                        self._keep_best(found)
                if found or state.pending:
                    write({"step": state.step, **(state.pending or {}), **found})
                state.pending = None
                return True

            if state.step == 0 and self.valid and not self.goes_on:
                state.pending = {}
            if state.pending is not None:
                figures = state.pending
                stopped = not validate()
                self._save()
            shares = stack.enter_context(closing(self._shares(state.step)))
            while state.step < self.total and not stopped:
                number = state.step + 1
                try:
                    figures, stopping = self._take_step(number, next(shares), should_stop, progress)
                except BaseException as error:
                    # A run of no steps leaves nothing, unless there is a batch to look at that taught no numbers.
                    if self.updater.is_whole and (state.step or isinstance(error, NotFinite)):
                        self._save()
                    raise
                state.step = number
                self.updater.is_whole = True
                stopped = (stopping and number < self.total) or self.collapse is not None
                is_due = bool(self.valid) and (number % config.valid_every == 0 or number == self.total)
                if is_due:
                    state.pending = dict(figures)
                else:
                    write({"step": number, **figures})
                if is_due or number % config.save_every == 0 or number == self.total or stopped:
                    self._compare_ranks()
                    self._save()
                if is_due:
                    stopped = not validate() or stopped
                    self._save()
            if metrics_log is not None and config.plot is not None:
                plot_curves(metrics_log.entries(), config.plot)
        if self.collapse is not None:
            raise self.collapse
        return TrainReport(
            reward=config.own_reward or "the paper's reward",
            output=config.output,
            best=config.output / "best" if state.best is not None else None,
            best_step=state.best_step,
            steps=state.step,
            total_steps=self.total,
            stopped=stopped,
            seconds=time.perf_counter() - started,
            figures=figures,
            valid=valid,
            skipped=dict(state.skipped),
            warnings=tuple(self.warnings),
            rank=self.ranks.rank,
        )

    def _take_step(
        self, number: int, share: "_Share", should_stop: ShouldStop | None, progress: Bar | None
    ) -> tuple[dict[str, Any], bool]:
        """One step over all ranks: its figures, and whether some rank wants to stop."""
        config, clock = self.config, time.perf_counter
        hand_over()  # a reasoner of this process answers between steps
        mx.reset_peak_memory()
        begun = clock()
        progress = progress or _unseen
        groups, skipped = self._sample(share, number, progress)
        progress("learn", 0, 1)
        sampled = clock()
        rate = learning_rate(
            number, highest=config.learning_rate, kind=config.schedule, warmup=config.warmup_steps, total=self.total
        )
        try:
            update = self.updater.update(groups, rate, step=number)
        except NotFinite as error:
            raise self._failed(number, error) from error
        ended = clock()
        own = {
            "groups": [
                summarise_group(self.model, group, stats, threshold=self.threshold)
                for group, stats in zip(groups, update.stats)
            ],
            "skipped": skipped,
            "stop": should_stop is not None and should_stop(),
            "peak": int(mx.get_peak_memory()),
        }
        del groups
        every = [json.loads(one) for one in self.ranks.all_gather(json.dumps(own).encode())]
        records = sorted((group for one in every for group in one["groups"]), key=lambda group: str(group["id"]))
        for one in every:
            self.state.skipped |= one["skipped"]
        if not records and len(self.state.skipped) == len(self.rows):
            reason = next(iter(self.state.skipped.values()))
            raise DataError(f"none of the {len(self.rows)} rows can be used; the first: {reason}")
        figures: dict[str, Any] = step_metrics(records)
        self._watch(records, figures["entropy"])
        tokens = sum(count for record in records for count in record["tokens"])
        figures |= {
            "grad_norm": update.grad_norm,
            "learning_rate": rate,
            "tokens_per_second": tokens / (ended - begun),
            "rollout_seconds": sampled - begun,
            "update_seconds": ended - sampled,
            "peak_memory": max(one["peak"] for one in every),
            "rows": len(records),
        }
        return figures, any(one["stop"] for one in every)

    def _sample(self, share: "_Share", number: int, progress: Bar) -> tuple[list[ScoredGroup], dict[str, str]]:
        """This rank's groups, and its rows that could not be used."""
        groups, skipped = [], {}
        for done, (row, vision) in enumerate(share.rows):
            progress("sample", done, share.count)
            try:
                if isinstance(vision, Exception):
                    raise vision
                prompt = encode_row(
                    self.model,
                    row,
                    spec=self.spec,
                    max_prompt_tokens=self.config.max_prompt_tokens,
                    vision=vision,
                )
                groups.append(self.updater.sample(prompt, number))
            except (DataError, MediaError) as error:
                told = str(error) if str(error).startswith(row.line) else f"{row.line}: {error}"
                if not self.config.skip_bad_rows:
                    raise type(error)(f"{told}; --skip-bad-rows leaves such rows out") from error
                skipped[row.id] = told
        return groups, skipped

    def _shares(self, done: int) -> Generator["_Share", None, None]:
        """This rank's rows of each step that is left, with what they show, read one row ahead."""
        counts, order = [], []
        for batch in islice(_batches(self.config, len(self.rows), self.ranks), done, self.total):
            counts.append(len(batch))
            order += [self.rows[index] for index in batch]
        with closing(read_ahead(order, self.spec)) as media:
            places = iter(zip(order, media))
            for count in counts:
                yield _Share(((row, vision) for row, (vision, _) in islice(places, count)), count)

    def validate(self, progress: Bar | None, should_stop: ShouldStop | None) -> Mapping[str, Any] | None:
        """Figures on the validation rows, brought together from all ranks; None: some rank was asked to stop."""
        own = self.valid[self.ranks.rank :: self.ranks.size]
        judged: list[ValidatedRow] = []
        with closing(read_ahead(own, self.spec)) as media:
            for done, (row, (vision, _)) in enumerate(zip(own, media)):
                if should_stop is not None and should_stop():
                    break
                if isinstance(vision, Exception):
                    raise DataError(f"{row.line}: {vision}") from vision
                prompt = encode_row(self.model, row, spec=self.spec, vision=vision)
                group = rollout(
                    self.model,
                    prompt,
                    group_size=1,
                    max_tokens=self.config.max_completion_tokens,
                    temperature=0.0,
                    seed=0,
                    prefill_step_size=self.config.prefill_step_size,
                )
                judged.append(
                    validate_answer(self.model, group, threshold=self.threshold, weights=self.weights, own=self.own)
                )
                if progress is not None:
                    progress("validate", done + 1, len(own))
        told = json.dumps([dataclasses.asdict(one) for one in judged]).encode()
        every = [ValidatedRow(**one) for part in self.ranks.all_gather(told) for one in json.loads(part)]
        return summarise(every) if len(every) == len(self.valid) else None

    def _watch(self, records: Sequence[Mapping[str, Any]], entropy: float | None) -> None:
        """Let the guard see the rows without answers; the same on every rank."""
        unlabelled = [GroupAnswer(**record["unlabelled"]) for record in records if record["unlabelled"] is not None]
        warning = None
        try:
            warning = self.guard.observe(unlabelled, entropy)
        except ConfigError as error:
            self.collapse = error
        self.state.guard = self.guard.state() if unlabelled else self.state.guard
        if warning is not None:
            self.warnings.append(warning)
            self._note(warning)

    def _failed(self, number: int, error: NotFinite) -> NotFinite:
        """The error with the step's rows, which are written down."""
        batch = next(islice(_batches(self.config, len(self.rows), None), number - 1, None))
        rows = [self.rows[index] for index in batch]
        path = self.config.output / "failed_batch.json"
        if self.ranks.rank == 0:
            told = {"step": number, "error": str(error), "rows": [{"id": row.id, "line": row.line} for row in rows]}
            content = json.dumps(told, indent=2, ensure_ascii=False).encode("utf-8", "surrogatepass")
            replace_file(path, lambda file: file.write(content))
        ids = ", ".join(row.id for row in rows)
        return NotFinite(f"step {number}, rows {ids}: {error}; see {path}")

    def _keep_best(self, figures: Mapping[str, Any]) -> None:
        if self.state.best is None or figures["valid_reward"] > self.state.best:
            self.state.best, self.state.best_step = figures["valid_reward"], self.state.step
            if self.ranks.rank == 0:
                save_adapter(self.config.output / "best", self.model, self.lora)

    def _compare_ranks(self) -> None:
        """Say once that the ranks' adapters have become different ones."""
        told = (
            "the ranks' adapters are no longer the same to the last bit: their machines round differently; "
            "that of rank 0 is saved"
        )
        if told not in self.warnings and not have_same_bits(self.ranks, lora_weights(self.model)):
            self.warnings.append(told)
            self._note(told)

    def _save(self) -> None:
        if self.ranks.rank == 0:
            reference = self.updater.reference
            save_state(self.config.output, self.model, self.updater.optimizer, self.state, reference=reference)
            save_adapter(self.config.output, self.model, self.lora)

    def _open_log(self, stack: ExitStack) -> MetricsLog | None:
        """Open the metrics of rank 0 where the run resumes; None on other ranks."""
        if self.ranks.rank:
            return None
        output = self.config.output
        write_settings(output / _SETTINGS_FILE, self.config, title="what `mlxvr train --config` reads")
        told = {name: str(value) for name, value in dataclasses.asdict(self.config).items()}
        metrics_log = stack.enter_context(MetricsLog(output, sinks=make_sinks(self.config.report_to, output, told)))
        kept = self.state.step - (self.state.pending is not None)  # a step that is measured anew is written anew
        metrics_log.rewind(kept if self.goes_on else -1)
        return metrics_log


@dataclass(frozen=True)
class _Share:
    """A rank's rows of a step with what they show, or why that cannot be read."""

    rows: Iterator[tuple[Row, Any]] = field(repr=False)
    count: int


def _batches(config: TrainConfig, count: int, ranks: ProcessGroup | None) -> Iterator[tuple[int, ...]]:
    """The share of a rank in each step, for ever; without ranks the whole batches."""
    epoch = 0
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    while True:
        yield from batches(count, batch_size=config.batch_size, seed=config.seed, epoch=epoch, rank=rank, ranks=size)
        epoch += 1


def _check_sizes(
    config: TrainConfig, model: VideoModel, rows: Sequence[Row], spec: VisionSpec, note: OnNote, *, ranks: int = 1
) -> None:
    """Refuse prompts that are too long and work that cannot fit into memory, and say what it needs."""
    lengths = measure_prompts(model, rows, spec, max_prompt_tokens=config.max_prompt_tokens)
    note(lengths.describe())
    left_out = check_lengths(config, model, lengths, spec)
    if left_out is not None:
        note(left_out)
    need, allowed = estimate_memory(config, model, lengths, len(rows), ranks=ranks)
    for line in need.describe().splitlines():
        note(line)
    need.refuse_over(allowed)


def _filter(
    config: TrainConfig,
    model: VideoModel,
    rows: Sequence[Row],
    own: RewardFunction | None,
    note: OnNote,
    progress: Bar | None,
    should_stop: ShouldStop | None,
) -> FilterReport:
    """Filter by what the adapter that training would begin from makes of the rows, judged as training would."""
    judged_by = {}
    if config.adapter is not None:
        attach_saved(model, config.adapter)
        judged_by["adapter"] = adapter_digest(model)
    if config.own_reward is not None:
        judged_by["reward"] = config.own_reward
    spec = frame_spec(config, model)
    _check_sizes(config, model, rows, spec, note)
    return filter_rows(
        model,
        rows,
        config.output / "kept.jsonl",
        samples=config.filter_samples,
        threshold=config.filter_threshold,
        sampling=Sampling(
            max_tokens=config.max_completion_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            max_prompt_tokens=config.max_prompt_tokens,
            prefill_step_size=config.prefill_step_size,
        ),
        spec=spec,
        media_root=config.media_root,
        skip_bad=config.skip_bad_rows,
        reward=own,
        judged_by=judged_by,
        progress=progress,
        should_stop=should_stop,
    )


def _silent(_: str) -> None:
    pass


def _unseen(stage: str, done: int, total: int) -> None:
    pass
