"""The settings of an evaluation: one frozen dataclass, from whose fields the command line is derived.

A field that is also a flag carries its help in its metadata, so that a name, a type and a default are written once.
What can be checked before a model is loaded is checked here.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from mlxvr.answering.loop import AskRequest
from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.checkpoint.bundled import is_demo_model
from mlxvr.cli.settings import flag, same_as
from mlxvr.errors import ConfigError, DataError
from mlxvr.evaluation.analysis.calibration import Calibration, Goal
from mlxvr.evaluation.analysis.threshold_search import CalibrationPlan, calibrate
from mlxvr.evaluation.samples import Sample
from mlxvr.media.frame_options import FrameLimitOptions
from mlxvr.reasoner.load_options import LoadOptions

__all__ = ["EvalConfig"]

_BUDGETS = ("ratio", "tokens")
_OF_MODELS = ("config.json", "adapter_config.json")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(FrameLimitOptions, LoadOptions):
    """Which model is evaluated on which questions, and which figures are computed; refuses values that cannot be used.

    Each field, those of `LoadOptions` and `FrameLimitOptions` among them, is a flag of `python -m mlxvr.eval`, whose
    help describes it. Without `model` and data, the bundled checkpoint is evaluated on the bundled clips, which are
    also the default data of a checkpoint that was made from it.
    """

    data: Path | None = field(
        default=None,
        metadata=flag(
            "data", "JSONL, one question a line (default, for the demo model only: the bundled clips)", metavar="FILE"
        ),
    )
    media_root: Path | None = field(
        default=None, metadata=flag("data", "folder that holds the media (default: the file's)", metavar="DIR")
    )
    task: str | None = field(
        default=None, metadata=flag("data", "a public benchmark instead, read from --data-root", metavar="NAME")
    )
    data_root: Path | None = field(
        default=None, metadata=flag("data", "folder of the benchmark's files", metavar="DIR")
    )
    subtitles: bool = field(default=False, metadata=flag("data", "put the benchmark's subtitles into its questions"))
    skip_bad_rows: bool = field(
        default=False, metadata=flag("data", "leave out rows of --data that cannot be used, instead of stopping")
    )
    limit: int | None = field(default=None, metadata=flag("data", "ask only the first N questions", metavar="N"))

    output: Path = field(metadata=flag("run", "folder for samples and report", metavar="DIR"))
    max_tokens: int = same_as(SamplingConfig, "max_tokens", "run")
    threshold: float | None = same_as(AskRequest, "threshold", "run")
    live: bool = field(
        default=False,
        metadata=flag("run", "stop early at the threshold, instead of computing auto from whole answers afterwards"),
    )
    workers: int = field(
        default=1, metadata=flag("run", "processes on this machine, each with a model of its own", metavar="N")
    )
    retry_errors: bool = field(default=False, metadata=flag("run", "ask the rows again that failed in an earlier run"))

    calibrate: str | None = field(
        default=None,
        metadata=flag("figures", "choose the threshold: no_loss, accuracy, ratio=X or tokens=X", metavar="GOAL"),
    )
    margin: float = field(
        default=CalibrationPlan.margin, metadata=flag("figures", "drop in score that no_loss tolerates", metavar="X")
    )
    folds: int = field(
        default=CalibrationPlan.folds,
        metadata=flag("figures", "folds of held-out clips behind the calibration's figures", metavar="N"),
    )
    per_task: bool = field(default=False, metadata=flag("figures", "calibrate each task, too"))
    temperature_scaling: bool = field(
        default=False, metadata=flag("figures", "report temperature scaling beside the raw confidence")
    )
    write_threshold: bool = field(
        default=False, metadata=flag("figures", "write the chosen threshold into the model folder's mlxvr.json")
    )
    threshold_file: Path | None = field(
        default=None,
        metadata=flag("figures", "write the chosen threshold into a JSON file instead", metavar="FILE"),
    )
    compare: tuple[Path, ...] = field(
        default=(),
        metadata=flag(
            "figures",
            "one output folder: compare this run with it; two: compare the second with the first, and run nothing",
            metavar="DIR",
            nargs="+",
            type=Path,
        ),
    )
    resamples: int = field(
        default=1000, metadata=flag("figures", "bootstrap resamples behind the 95%% intervals", metavar="N")
    )
    seed: int = field(default=0, metadata=flag("figures", "seed of resamples and folds", metavar="N"))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "compare", tuple(self.compare))  # argparse gives a list
        self._check_comparison()
        if self.data is not None and self.task is not None:
            raise ConfigError("both a data file and a benchmark are given: choose --data or --task")
        if (self.task is None) != (self.data_root is None):
            raise ConfigError("--task and --data-root go together: name the benchmark and the folder of its files")
        if self.subtitles and self.task is None:
            raise ConfigError("--subtitles is for benchmarks: rows of a data file carry their own")
        if self.data is None and self.task is None and not is_demo_model(self.model):
            raise ConfigError("no questions for this model: add --data FILE, or --task NAME --data-root DIR")
        for name, value, least in (
            ("limit", self.limit, 1),
            ("workers", self.workers, 1),
            ("resamples", self.resamples, 0),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name} {value} cannot be used: give a whole number of at least {least}")
        AskRequest("?", threshold=self.threshold, max_tokens=self.max_tokens)  # refuses what cannot be used
        self._check_output()
        self._check_calibration()

    def _check_output(self) -> None:
        for name in _OF_MODELS:
            if (self.output / name).is_file():
                raise ConfigError(
                    f"{self.output} is the folder of a model or an adapter, for it has {name}: give --output a folder "
                    "of its own"
                )

    def _check_comparison(self) -> None:
        if len(self.compare) > 2:
            raise ConfigError(f"{len(self.compare)} runs are to be compared: give --compare one folder, or two")
        if len(self.compare) < 2:
            if self.media_root is not None and self.data is None:
                raise ConfigError("--media-root is for a data file: add --data FILE")
            return
        for name in ("model", "adapter", "data", "task", "live", "write_threshold", "retry_errors", "limit"):
            if getattr(self, name):
                raise ConfigError(
                    f"--compare of two finished runs asks no model: leave --{name.replace('_', '-')} out, or compare "
                    "one folder with a run of it"
                )

    def _check_calibration(self) -> None:
        if self.calibrate is None:
            for name in ("write_threshold", "threshold_file", "per_task", "temperature_scaling"):
                if getattr(self, name):
                    raise ConfigError(f"--{name.replace('_', '-')} is for a calibration: add --calibrate GOAL")
            return
        goal, budget = self.goal
        if goal not in get_args(Goal) or (budget is None) == (goal in _BUDGETS):
            raise ConfigError(f"calibrate {self.calibrate!r} is unknown: use no_loss, accuracy, ratio=X or tokens=X")
        if self.live:
            raise ConfigError("a live run stops at one threshold and cannot choose another: calibrate without --live")
        if self.write_threshold and self.threshold_file is not None:
            raise ConfigError("--write-threshold writes into the model folder: leave it or --threshold-file out")
        if self.threshold_file is not None and self.threshold_file.is_dir():
            raise ConfigError(f"{self.threshold_file} is a folder: give --threshold-file the name of a file in it")
        if self.write_threshold and self.adapter is not None:
            raise ConfigError(
                "the threshold of an adapter is not its model's: fuse it first (mlxvr fuse), or give --threshold-file"
            )
        with suppress(DataError):  # its arguments are checked before it finds no sample
            self.calibration_of(())

    def calibration_of(self, samples: Iterable[Sample]) -> Calibration:
        """Calibrate as `calibrate` says; raises as `mlxvr.evaluation.analysis.threshold_search.calibrate`."""
        goal, budget = self.goal
        plan = CalibrationPlan(
            goal,  # type: ignore[arg-type]
            margin=self.margin,
            budget=budget,
            folds=self.folds,
            per_task=self.per_task,
            temperature=self.temperature_scaling,
            bootstrap=self.resamples,
            seed=self.seed,
        )
        return calibrate(samples, plan)

    @property
    def goal(self) -> tuple[str, float | None]:
        """Goal and budget of `calibrate`."""
        goal, equals, number = (self.calibrate or "").partition("=")
        try:
            return goal, float(number) if equals else None
        except ValueError:
            raise ConfigError(f"calibrate {self.calibrate!r}: {number!r} is not a number, such as 0.3") from None

    @property
    def needs_answers(self) -> bool:
        """Whether rows need a right answer: always, unless the goal is a budget of thinking."""
        return self.goal[0] not in _BUDGETS
