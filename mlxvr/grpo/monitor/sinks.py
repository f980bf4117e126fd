"""Other places that a run's metrics go to while it is on: TensorBoard and Weights & Biases.

They get copies of the entries of `metrics.jsonl`. TensorBoard is written through tensorboardX, which needs neither
torch nor TensorFlow.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlxvr.errors import ConfigError
from mlxvr.storage.atomic import replace_file, unwritable

__all__ = ["SINKS", "Sink", "make_sinks"]


class Sink(Protocol):
    """Another place that entries go to."""

    def write(self, entry: Mapping[str, Any]) -> None:
        """Take an entry, as it is in the file."""

    def rewind(self, step: int) -> None:
        """Forget entries after a step, as far as the place can."""

    def close(self) -> None:
        """Send what is left; nothing comes after."""


def make_sinks(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Sink]:
    """Open the places that a run's metrics go to beside its log.

    Args:
        names: of `SINKS`, without regard to order or repetition.
        folder: of the run: TensorBoard's files come into `folder/tensorboard`, those of Weights & Biases into
            `folder/wandb`, and the run's id there into `folder/wandb_id`, so that a run that is resumed keeps its id.
        config: the run's settings, JSON-ready.

    Raises `ConfigError`: a name that is none of `SINKS`, a package that is not installed (the message says how to
    install it), or a place that cannot be opened.
    """
    for name in names:
        if name not in SINKS:
            raise ConfigError(f"{name!r} is no place for metrics: expected {' or '.join(SINKS)}")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    opened: list[Sink] = []
    try:
        for name in dict.fromkeys(names):
            opened.append(SINKS[name](folder, config))
    except BaseException:
        for sink in opened:
            sink.close()
        raise
    return opened


class _TensorBoard:
    """Metrics as scalars: those of validations under `valid/`, the others under `train/`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"tensorboard needs tensorboardX ({error}): pip install tensorboardX, and tensorboard to look at it"
            ) from error
        self._make_writer = SummaryWriter
        self._folder = folder / "tensorboard"
        self._config = json.dumps(dict(config), indent=2, default=str)
        self._writer: Any = None
        self._written = 0  # files of this process; two of one second would have one name
        self._from: int | None = None

    def write(self, entry: Mapping[str, Any]) -> None:
        writer, step = self._open(), entry.get("step")
        for name, value in _metrics(entry).items():
            tag = f"valid/{name.removeprefix('valid_')}" if name.startswith("valid_") else f"train/{name}"
            writer.add_scalar(tag, value, step)
        writer.flush()

    def rewind(self, step: int) -> None:
        """What is shown from the next step on is hidden once a file says that it begins there."""
        self._close_file()
        self._from = step + 1

    def close(self) -> None:
        self._close_file()

    def _open(self) -> Any:
        if self._writer is None:
            suffix = f".{self._written}" if self._written else ""
            self._writer = self._make_writer(str(self._folder), purge_step=self._from, filename_suffix=suffix)
            if not self._written:
                self._writer.add_text("config", f"```\n{self._config}\n```", self._from or 0)
            self._written += 1
        return self._writer

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Wandb:
    """Metrics over the run's own `step`; a step that is trained again is shown again, since W&B forgets nothing."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"wandb is not installed ({error}): pip install wandb") from error
        try:
            self._run: Any = wandb.init(
                project="mlxvr", dir=str(folder), config=dict(config), id=_wandb_id(folder), resume="allow"
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # every release of wandb has other errors
            raise ConfigError(
                f"wandb does not start ({error}): run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def write(self, entry: Mapping[str, Any]) -> None:
        step = {"step": entry["step"]} if "step" in entry else {}
        self._run.log({**step, **_metrics(entry)})

    def rewind(self, step: int) -> None:
        return

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Path, Mapping[str, Any]], Sink]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}


def _wandb_id(folder: Path) -> str:
    """The id of the folder's run, made when there is none."""
    path = folder / "wandb_id"
    try:
        run_id = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        run_id = ""
    if not run_id:
        run_id = secrets.token_hex(4)
        replace_file(path, lambda file: file.write(f"{run_id}\n".encode()))
    return run_id


def _metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in entry.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
