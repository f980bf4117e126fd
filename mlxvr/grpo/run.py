"""A training run: its parts, and the loop that steps, validates, logs, saves and resumes.

Order of a step that is validated: the state is saved with the step's metrics as `pending`, the rows are validated, the
entry is written, and the state is saved without them. So a run that is killed in between measures that step again.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from mlxvr import __version__
from mlxvr.cli.settings import write_settings
from mlxvr.data.rows import Row, to_record
from mlxvr.errors import ConfigError, DataError
from mlxvr.grading.reward import RewardFunction
from mlxvr.grpo.collapse_guard import CollapseGuard, GroupAnswer
from mlxvr.grpo.data_order import batches
from mlxvr.grpo.monitor.curves import plot_curves
from mlxvr.grpo.monitor.metrics_log import FILE_NAME, MetricsLog
from mlxvr.grpo.monitor.sinks import make_sinks
from mlxvr.grpo.monitor.train_report import TrainReport
from mlxvr.grpo.setup import check_sizes, default_threshold, frame_spec, identity, reward_weights
from mlxvr.grpo.shared_state import check_same, have_same_bits, shared_state
from mlxvr.grpo.step.lora import adapter_state, attach, attach_saved, lora_weights, save_adapter
from mlxvr.grpo.step.policy_update import NotFinite, PolicyUpdater
from mlxvr.grpo.step.reward_model import RewardModel
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.grpo.train_state import TrainState, load_state, read_state, save_state, state_file
from mlxvr.grpo.training_step import StepResult, StepTaker
from mlxvr.grpo.validation import Validator
from mlxvr.model.network import VideoModel
from mlxvr.runtime.distributed import ProcessGroup
from mlxvr.runtime.hooks import Hooks
from mlxvr.storage.paths import list_all

__all__ = ["OnEntry", "OnNote", "RunInputs", "TrainingRun"]

OnEntry = Callable[[Mapping[str, Any], int], None]
OnNote = Callable[[str], None]
_SETTINGS_FILE = "train_config.toml"


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What a run starts from.

    Attributes:
        config: the settings.
        model: without adapters.
        rows: to learn from.
        validation_rows: to measure on; may be empty.
        ranks: this process among the others.
        own_reward: the user's reward function; None: the paper's reward.
        note: called with each line of text that people should see.
    """

    config: TrainConfig
    model: VideoModel
    rows: Sequence[Row]
    validation_rows: Sequence[Row]
    ranks: ProcessGroup
    own_reward: RewardFunction | None
    note: OnNote


class TrainingRun:
    """A run: resumed or new, with everything checked before anything is written."""

    def __init__(self, inputs: RunInputs, hooks: Hooks) -> None:
        """Attach the adapter, check sizes and ranks, and load the saved state if the run resumes. Raises as `train`."""
        config, model, ranks = inputs.config, inputs.model, inputs.ranks
        self._config, self._model, self._ranks, self._hooks = config, model, ranks, hooks
        self._rows, self._validation_rows = inputs.rows, inputs.validation_rows
        self._note = inputs.note
        self._warnings: list[str] = []
        spec = frame_spec(config, model)
        threshold = default_threshold(model) if config.threshold is None else config.threshold
        weights = reward_weights(config)
        fingerprint = model.fingerprint
        if config.adapter is None:
            self._lora = config.lora
            attach(model, self._lora, seed=config.seed)
            reference = None
        else:
            self._lora = attach_saved(model, config.adapter)
            reference = adapter_state(model)
        reward_model = RewardModel(
            weights=weights, own=inputs.own_reward, label_free=config.label_free, temperature=config.temperature
        )
        self._updater = PolicyUpdater(model, config, reward_model, ranks, reference=reference)
        self._guard = CollapseGuard()
        self._collapse: ConfigError | None = None  # what the guard ends the run with, once the step is saved
        steps_per_epoch = len(batches(len(inputs.rows), batch_size=config.batch_size, seed=0, epoch=0))
        self._total_steps = config.steps or steps_per_epoch * config.epochs
        check_sizes(config, model, inputs.rows, spec, note=self._note, ranks=ranks.size)
        self._state = TrainState(run=identity(config, model, fingerprint, inputs.rows, self._total_steps))
        check_same(ranks, {**self._state.run, **self._schedule_identity()})
        self._resumes = config.resume and self._load_state()
        self._steps = StepTaker(
            config=config,
            rows=inputs.rows,
            ranks=ranks,
            updater=self._updater,
            spec=spec,
            threshold=threshold,
            total_steps=self._total_steps,
        )
        self._validator = Validator(
            model=model,
            config=config,
            ranks=ranks,
            spec=spec,
            threshold=threshold,
            weights=weights,
            own_reward=inputs.own_reward,
        )
        if self._validation_rows and inputs.own_reward is not None:
            self._note(f"validation rewards, and so which adapter is best, are those of {config.own_reward}")

    def run(self, on_entry: OnEntry | None = None) -> TrainReport:
        """Take all steps that are left.

        A run that ends before its first step leaves no files behind: the next run may begin in the same folder.

        Args:
            on_entry: called with each entry of the log and the total number of steps, on rank 0.
        """
        output = self._config.output
        new_files = [path for path in (output / _SETTINGS_FILE, output / FILE_NAME) if not path.exists()]
        is_new_folder = not output.exists()
        try:
            return self._run(on_entry)
        finally:
            if self._ranks.rank == 0 and self._state.step == 0 and not state_file(output).exists():
                for path in new_files:
                    path.unlink(missing_ok=True)
                if is_new_folder and output.is_dir() and not list_all(output):
                    output.rmdir()

    def _run(self, on_entry: OnEntry | None) -> TrainReport:
        config, state = self._config, self._state
        started = time.perf_counter()
        metrics: Mapping[str, Any] = {}
        validations: dict[int, Mapping[str, Any]] = {}
        stopped = False
        with ExitStack() as stack:
            metrics_log = self._open_log(stack)

            def write(entry: Mapping[str, Any]) -> None:
                if metrics_log is not None:
                    metrics_log.write(entry)
                    if on_entry is not None:
                        on_entry(entry, self._total_steps)

            def validate() -> bool:
                """Measure after a step that is saved, and write its entry; False when that was stopped."""
                measured = self._validator.measure(self._validation_rows, self._hooks) if self._validation_rows else {}
                if measured is None:
                    return False
                if measured:
                    validations[state.step] = measured
                    if state.step:
                        self._keep_best(measured)
                if measured or state.pending:
                    write({"step": state.step, **(state.pending or {}), **measured})
                state.pending = None
                return True

            if state.step == 0 and self._validation_rows and not self._resumes:
                state.pending = {}
            if state.pending is not None:
                metrics = state.pending
                stopped = not validate()
                self._save()
            shares = stack.enter_context(closing(self._steps.shares(state.step)))
            while state.step < self._total_steps and not stopped:
                number = state.step + 1
                try:
                    result = self._steps.take(number, next(shares), self._hooks)
                    self._take_in(result)
                except BaseException as error:
                    # A run of no steps leaves nothing, unless its first batch shows which rows were not finite.
                    if self._updater.is_whole and (state.step or isinstance(error, NotFinite)):
                        self._save()
                    raise
                metrics = result.metrics
                state.step = number
                self._updater.is_whole = True
                is_last = number == self._total_steps
                stopped = (result.wants_stop and not is_last) or self._collapse is not None
                is_due = bool(self._validation_rows) and (number % config.valid_every == 0 or is_last)
                if is_due:
                    state.pending = dict(metrics)
                else:
                    write({"step": number, **metrics})
                if is_due or number % config.save_every == 0 or is_last or stopped:
                    self._compare_ranks()
                    self._save()
                if is_due:
                    stopped = not validate() or stopped
                    self._save()
            if metrics_log is not None and config.plot is not None:
                plot_curves(metrics_log.entries(), config.plot)
        if self._collapse is not None:
            raise self._collapse
        return TrainReport(
            reward=config.own_reward or "the paper's reward",
            output=config.output,
            best=config.output / "best" if state.best is not None else None,
            best_step=state.best_step,
            steps=state.step,
            total_steps=self._total_steps,
            stopped=stopped,
            seconds=time.perf_counter() - started,
            metrics=metrics,
            valid=validations,
            skipped=dict(state.skipped),
            warnings=tuple(self._warnings),
            rank=self._ranks.rank,
        )

    def _take_in(self, result: StepResult) -> None:
        """Remember which rows a step skipped, and show the guard its rows without answers; the same on every rank."""
        self._state.skipped |= result.skipped
        if not result.groups and len(self._state.skipped) == len(self._rows):
            reason = next(iter(self._state.skipped.values()))
            raise DataError(f"none of the {len(self._rows)} rows can be used; the first: {reason}")
        unlabelled = [GroupAnswer(**group["unlabelled"]) for group in result.groups if group["unlabelled"] is not None]
        warning = None
        try:
            warning = self._guard.observe(unlabelled, result.metrics["entropy"])
        except ConfigError as error:
            self._collapse = error
        self._state.guard = self._guard.state() if unlabelled else self._state.guard
        if warning is not None:
            self._warn(warning)

    def _schedule_identity(self) -> dict[str, Any]:
        """What the ranks must have in common beside what decides the steps: what they do together, and when."""
        config = self._config
        records = [to_record(row, media=row.media) for row in self._validation_rows]
        return {
            "resume": config.resume,
            "steps": self._total_steps,
            "save_every": config.save_every,
            "valid_every": config.valid_every,
            "validation rows": hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()[:16],
            "mlxvr": __version__,
            "mlx": version("mlx"),
        }

    def _load_state(self) -> bool:
        """Load the saved state; False for one of no steps and other settings: the run then begins anew."""
        asked = self._state.run
        with shared_state(self._ranks, self._config.output) as folder:
            saved = read_state(folder)
            different = [
                name for name in sorted(asked.keys() | saved.run.keys()) if asked.get(name) != saved.run.get(name)
            ]
            if different and saved.step == 0:
                return False
            self._state, self._updater.reference = load_state(folder, self._model, self._updater.optimizer)
        if different:
            name = different[0]
            raise ConfigError(
                f"{self._config.output} was begun with {name} {saved.run.get(name)!r}, and now it is "
                f"{asked.get(name)!r}: give what it was begun with, or start a run in another folder"
            )
        if self._state.guard:
            self._guard.restore(self._state.guard)
        return True

    def _save(self) -> None:
        if self._ranks.rank == 0:
            output, updater = self._config.output, self._updater
            save_state(output, self._model, updater.optimizer, self._state, reference=updater.reference)
            save_adapter(output, self._model, self._lora)

    def _keep_best(self, measured: Mapping[str, Any]) -> None:
        if self._state.best is None or measured["valid_reward"] > self._state.best:
            self._state.best, self._state.best_step = measured["valid_reward"], self._state.step
            if self._ranks.rank == 0:
                save_adapter(self._config.output / "best", self._model, self._lora)

    def _compare_ranks(self) -> None:
        """Warn once if the ranks' adapters have drifted apart."""
        warning = (
            "the ranks' adapters are no longer the same to the last bit: their machines round differently; "
            "that of rank 0 is saved"
        )
        if warning not in self._warnings and not have_same_bits(self._ranks, lora_weights(self._model)):
            self._warn(warning)

    def _warn(self, text: str) -> None:
        self._warnings.append(text)
        self._note(text)

    def _open_log(self, stack: ExitStack) -> MetricsLog | None:
        """Open the metrics of rank 0 where the run resumes; None on other ranks."""
        if self._ranks.rank:
            return None
        output = self._config.output
        write_settings(output / _SETTINGS_FILE, self._config, title="what `mlxvr train --config` reads")
        settings = {name: str(value) for name, value in dataclasses.asdict(self._config).items()}
        metrics_log = stack.enter_context(
            MetricsLog(output, sinks=make_sinks(self._config.report_to, output, settings))
        )
        # A step that is measured again is also written again.
        last_written = self._state.step - (self._state.pending is not None)
        metrics_log.rewind(last_written if self._resumes else -1)
        return metrics_log
