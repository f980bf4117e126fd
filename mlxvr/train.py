"""`python -m mlxvr.train`: fine-tune a model with LoRA and GRPO on questions about clips.

The work is `mlxvr.grpo.trainer.train`, which is also this module's `train` for use from Python. The flags are the
fields of `TrainConfig`, and so are the keys of `--config`. stdout carries the result, stderr the progress.
"""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvr.cli.parser import VerbParser, add_settings, parsed_settings, run_verb
from mlxvr.cli.progress import ProgressBar
from mlxvr.cli.settings import read_settings
from mlxvr.errors import ConfigError
from mlxvr.grpo.monitor.train_report import TrainReport
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.runtime.hooks import ShouldStop

if TYPE_CHECKING:
    from mlxvr.grpo.trainer import train

__all__ = ["TrainConfig", "TrainReport", "main", "make_parser", "train"]

_GROUPS = {
    "model": "model",
    "data": "data",
    "frames": "frames",
    "run": "run",
    "sampling": "sampling of completions",
    "reward": "reward",
    "loss": "loss",
    "adapter": "adapter",
    "optimizer": "optimizer",
    "validation": "validation",
}
_INTERRUPTED = 130


def __getattr__(name: str) -> Any:
    # MLX is not imported before the work begins, so that --help and wrong options answer at once.
    if name == "train":
        from mlxvr.grpo.trainer import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_parser() -> VerbParser:
    """The verb's options: one for each field of `TrainConfig`, `--config` and `--json`."""
    parser = VerbParser(
        "mlxvr train",
        "Fine-tune a model with LoRA and GRPO: sample groups of answers, reward both boxes, learn from the difference.",
        epilog="Ctrl-C finishes the step and saves; `mlxvr train --resume --output run` continues.\n"
        "example: mlxvr train --model videoauto-8b-4bit --data train.jsonl --valid valid.jsonl --output run",
    )
    add_settings(parser, TrainConfig, _GROUPS, sparse=True)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML with any of these settings; flags win")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit code."""
    return run_verb(make_parser(), _train, argv)


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The settings: flags win over `--config`, which wins over the settings of the run that `--resume` continues.

    Raises `ConfigError` when a setting cannot be used, or a necessary one is missing.
    """
    flags = parsed_settings(args, TrainConfig)
    values = read_settings(args.config, TrainConfig) if args.config is not None else {}
    given_values = {**values, **flags}
    output, resumes = given_values.get("output"), given_values.get("resume", False)
    begun = output / "train_config.toml" if resumes and output is not None else None
    if begun is not None and begun.is_file():  # only rank 0 has a run of its own
        values = {**read_settings(begun, TrainConfig), **values}
    values |= flags
    for name in ("data", "output"):
        if name not in values:
            if begun is not None and not begun.is_file():
                raise ConfigError(
                    f"{output} holds no run to resume: leave --resume out to start one, or give the folder of a run"
                )
            raise ConfigError(f"there is no {name}: give --{name}, or write it into --config")
    return TrainConfig(**values)


def _train(args: argparse.Namespace) -> int | None:
    config = read_config(args)
    from mlxvr.grpo.filter_report import FilterReport
    from mlxvr.grpo.monitor.live_view import LiveView
    from mlxvr.grpo.trainer import train

    view: LiveView | None = None

    def show(entry: Mapping[str, Any], total: int) -> None:
        nonlocal view
        view = view or LiveView(total, history=_history(config, entry), refresh_seconds=1.0)
        bar.clear()
        view.update(entry)

    def progress(stage: str, done: int, total: int) -> None:
        if view is None:
            bar(stage, done, total)
        else:
            view.work(stage, done, total)

    def note(text: str) -> None:
        bar.clear()
        print(text, file=sys.stderr) if view is None else view.note(text)

    with ProgressBar() as bar, _interruptible(note) as should_stop:
        try:
            report = train(config, progress=progress, on_entry=show, on_note=note, should_stop=should_stop)
        finally:
            if view is not None:
                view.close()
    if isinstance(report, FilterReport):
        print(json.dumps(report.to_dict(), ensure_ascii=False) if args.json else report.describe())
        return None
    if report.rank == 0:
        print(json.dumps(report.to_dict(), ensure_ascii=False) if args.json else _describe(report))
    return _INTERRUPTED if report.stopped else None


def _history(config: TrainConfig, first: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a resumed run had recorded before its first new entry."""
    from mlxvr.grpo.monitor.metrics_log import FILE_NAME, read_metrics

    if not config.resume:
        return []
    return [entry for entry in read_metrics(config.output / FILE_NAME) if entry["step"] < first["step"]]


@contextmanager
def _interruptible(note: Callable[[str], None]) -> Iterator[ShouldStop]:
    """Ask to stop at the first SIGINT, SIGTERM or SIGHUP; the second stops at once."""
    asked = threading.Event()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _: object) -> None:
        asked.set()
        restore()
        note(f"{signal.Signals(number).name}: stopping after this step, which is saved; a second time stops at once")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # such as under nohup
                before[number] = signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        restore()


def _describe(report: TrainReport) -> str:
    """The result for people."""
    lines = [f"{report.steps} of {report.total_steps} steps; the adapter is in {report.output}"]
    if report.stopped:
        lines.append(f"stopped; `mlxvr train --resume --output {report.output}` continues")
    for step, metrics in report.valid.items():
        if step in (min(report.valid), report.best_step, max(report.valid)):
            is_best = step == report.best_step and report.best is not None
            named = f"best by reward ({metrics['valid_reward']:.3f}, {report.reward}), " if is_best else ""
            lines.append(
                f"{named}after {step} steps: first {metrics['valid_first_accuracy']:.3f}, second "
                f"{metrics['valid_second_accuracy']:.3f}, auto {metrics['valid_auto_accuracy']:.3f} at think ratio "
                f"{metrics['valid_think_ratio']:.3f} and {metrics['valid_tokens']:.1f} tokens"
            )
    if report.best is not None:
        lines.append(f"the best adapter is in {report.best}")
    if report.left_out:
        lines.append(f"{report.left_out} rows of the data were left out before the start")
    if report.skipped:
        name, reason = next(iter(report.skipped.items()))
        lines.append(f"{len(report.skipped)} rows could not be used (the first: {name}: {reason})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
