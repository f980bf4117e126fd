"""Training, from the settings to an adapter: `train(config)`. `mlxvr.grpo.run` is the loop over the steps.

    output/
      adapters.safetensors, adapter_config.json     the adapter as it was last saved
      best/                                         the adapter with the highest reward on the validation rows
      train_config.toml                             the settings
      metrics.jsonl                                 the metrics of each step
      state/                                        what `--resume` needs

A step follows from the seed, its number and the rows' ids alone. So a run that was killed and resumed ends with the
same bits as a run that was not. There are two exceptions: a formula for which `math-verify` needs about its limit of
processor time (see `mlxvr.grading.math_equality`), and a user's own reward function whose result does not follow from
its arguments alone. Several ranks take the same steps, each with its share of the rows; only rank 0 writes.
"""

import dataclasses

from mlxvr.cli.plotting import check_plot
from mlxvr.cli.settings import settings_of
from mlxvr.errors import ConfigError
from mlxvr.grading.reward import load_reward
from mlxvr.grpo.filter_report import FilterReport
from mlxvr.grpo.filtering import FilterConfig, filter_rows
from mlxvr.grpo.monitor.train_report import TrainReport
from mlxvr.grpo.run import OnEntry, OnNote, RunInputs, TrainingRun
from mlxvr.grpo.setup import (
    check_output,
    check_rows,
    check_sizes,
    frame_spec,
    load,
    read_training_rows,
    read_validation_rows,
)
from mlxvr.grpo.step.lora import adapter_digest, attach_saved
from mlxvr.grpo.train_config import TrainConfig, idle_options
from mlxvr.runtime import device_memory
from mlxvr.runtime.device_lock import use_device
from mlxvr.runtime.distributed import ProcessGroup
from mlxvr.runtime.hooks import Hooks, Progress, ShouldStop

__all__ = ["train"]

_REASONS_SHOWN = 5


def train(
    config: TrainConfig,
    *,
    progress: Progress | None = None,
    on_entry: OnEntry | None = None,
    on_note: OnNote | None = None,
    should_stop: ShouldStop | None = None,
) -> TrainReport | FilterReport:
    """Fine-tune a model with GRPO; with `config.resume`, continue an earlier run where it was last saved.

    Args:
        config: the settings.
        progress: called with (stage, done, total): "download", "check", "filter", "sample" (rows of a step), "learn"
            (0 of 1: the update of a step begins) and "validate".
        on_entry: called on rank 0 with each entry of `metrics.jsonl` and the total number of steps.
        on_note: called on rank 0 with each line of text that people should see.
        should_stop: asked between steps and between validation rows; if it returns True, the run saves its state and
            returns.

    Returns:
        What was done; for `config.filter_only` what was kept.

    Raises:
        ConfigError: a setting cannot be used, the output is another run's, a rank is gone, or training without labels
            has collapsed (the step that showed it is saved). The run can be resumed from what was last saved.
        DataError: a row cannot be used, or a loss is not a finite number.
        CheckpointError: the model, adapter or state cannot be loaded.
        OutOfMemoryError: the run would not fit.
    """
    ranks = ProcessGroup()  # before anything that may be missing on one rank only, so that the others notice
    if config.filter_only and ranks.size > 1:
        raise ConfigError(f"filter_only is for one process, and these are {ranks.size} ranks: start it without them")
    if config.plot is not None:
        check_plot(config.plot)
    own_reward = None if config.own_reward is None else load_reward(config.own_reward)
    rows, left_out = read_training_rows(config)
    validation_rows = read_validation_rows(config)
    note = on_note if on_note is not None and ranks.rank == 0 else _ignore_note
    for reason in left_out[:_REASONS_SHOWN]:
        note(f"left out: {reason}")
    if len(left_out) > _REASONS_SHOWN:
        note(f"left out: {len(left_out) - _REASONS_SHOWN} rows more, {len(left_out)} in all")
    for reason, names in idle_options(config).items():
        flags = ", ".join(settings_of(TrainConfig)[name].flag for name in names)
        note(f"without effect: {flags}, as {reason}")
    if ranks.rank == 0:
        check_output(config)
    check_rows(config, [*rows, *validation_rows])
    inputs = RunInputs(
        config=config,
        model=load(config, progress),
        rows=rows,
        validation_rows=validation_rows,
        ranks=ranks,
        own_reward=own_reward,
        note=note,
    )
    hooks = Hooks(progress, should_stop)
    report: TrainReport | FilterReport
    with use_device(), device_memory.wired(), device_memory.limited(config.memory_limit):
        report = _filter(inputs, hooks) if config.filter_only else TrainingRun(inputs, hooks).run(on_entry)
    return dataclasses.replace(report, left_out=len(left_out))


def _filter(inputs: RunInputs, hooks: Hooks) -> FilterReport:
    """Filter the rows with the adapter that training would start from, judged as training would judge them."""
    config, model = inputs.config, inputs.model
    judged_by = {}
    if config.adapter is not None:
        attach_saved(model, config.adapter)
        judged_by["adapter"] = adapter_digest(model)
    if config.own_reward is not None:
        judged_by["reward"] = config.own_reward
    spec = frame_spec(config, model)
    check_sizes(config, model, inputs.rows, spec, note=inputs.note)
    settings = FilterConfig(
        samples=config.filter_samples,
        threshold=config.filter_threshold,
        sampling=config.sampling,
        max_prompt_tokens=config.max_prompt_tokens,
        prefill_step_size=config.prefill_step_size,
        spec=spec,
        media_root=config.media_root,
        skip_bad=config.skip_bad_rows,
        reward=inputs.own_reward,
        judged_by=judged_by,
    )
    return filter_rows(model, inputs.rows, config.output / "kept.jsonl", settings, hooks=hooks)


def _ignore_note(_: str) -> None:
    pass
