"""One step of a run over all ranks: sample, score, update, and bring the metrics together."""

import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import mlx.core as mx

from mlxvr.data.prefetch import read_ahead
from mlxvr.data.rows import Row
from mlxvr.errors import DataError, MediaError
from mlxvr.grpo.data_order import batches
from mlxvr.grpo.monitor.step_metrics import step_metrics, summarise_group
from mlxvr.grpo.schedule import learning_rate
from mlxvr.grpo.step.policy_update import NotFinite, PolicyUpdater, ScoredGroup
from mlxvr.grpo.step.prompts import encode_row
from mlxvr.grpo.train_config import TrainConfig
from mlxvr.media.spec import VisionSpec
from mlxvr.runtime.device_lock import hand_over
from mlxvr.runtime.distributed import ProcessGroup
from mlxvr.runtime.hooks import Hooks
from mlxvr.storage.atomic import replace_file

__all__ = ["Share", "StepResult", "StepTaker"]


@dataclass(frozen=True)
class Share:
    """A rank's rows of a step, each with its frames or the error that kept them from being read."""

    rows: Iterator[tuple[Row, Any]] = field(repr=False)
    count: int


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did; the same on every rank.

    Attributes:
        metrics: of the step, by the names of `metrics.jsonl`.
        groups: summaries of the groups of all ranks, sorted by the ids of their rows.
        skipped: the rows that could not be used, by id, and why.
        wants_stop: whether some rank was asked to stop.
    """

    metrics: dict[str, Any]
    groups: list[dict[str, Any]]
    skipped: dict[str, str]
    wants_stop: bool


@dataclass(frozen=True, kw_only=True)
class StepTaker:
    """Takes the steps of a run.

    Attributes:
        config: of the run.
        rows: all rows of the run.
        ranks: this process among the others.
        updater: the model, and how it learns.
        spec: how frames are sampled and sized.
        threshold: confidence from which a first answer is final, for the metrics.
        total_steps: of the run, for the learning rate.
    """

    config: TrainConfig
    rows: Sequence[Row]
    ranks: ProcessGroup
    updater: PolicyUpdater
    spec: VisionSpec
    threshold: float
    total_steps: int

    def shares(self, steps_done: int) -> Generator[Share, None, None]:
        """This rank's rows of each step that is left; media are read one row ahead."""
        counts, order = [], []
        for batch in islice(self._batches(self.ranks.rank, self.ranks.size), steps_done, self.total_steps):
            counts.append(len(batch))
            order += [self.rows[index] for index in batch]
        with closing(read_ahead(order, self.spec)) as media:
            pairs = iter(zip(order, media))
            for count in counts:
                yield Share(((row, vision) for row, (vision, _) in islice(pairs, count)), count)

    def take(self, number: int, share: Share, hooks: Hooks) -> StepResult:
        """Take a step over all ranks.

        Args:
            number: from 1.
            share: this rank's rows.
            hooks: progress and should_stop of the run.

        Raises `NotFinite`, `DataError`, `MediaError` or `ConfigError`, as `train`.
        """
        hand_over()  # a reasoner of this process answers between steps
        mx.reset_peak_memory()
        begun = time.perf_counter()
        groups, skipped = self._sample(share, number, hooks)
        _report_progress(hooks, "learn", 0, 1)
        sampled = time.perf_counter()
        rate = learning_rate(
            number,
            highest=self.config.learning_rate,
            kind=self.config.schedule,
            warmup=self.config.warmup_steps,
            total=self.total_steps,
        )
        try:
            update = self.updater.update(groups, rate, step=number)
        except NotFinite as error:
            raise self._record_failure(number, error) from error
        updated = time.perf_counter()
        own = {
            "groups": [
                summarise_group(self.updater.model, group, stats, threshold=self.threshold)
                for group, stats in zip(groups, update.stats)
            ],
            "skipped": skipped,
            "stop": hooks.should_stop is not None and hooks.should_stop(),
            "peak": int(mx.get_peak_memory()),
        }
        del groups
        parts = [json.loads(data) for data in self.ranks.all_gather(json.dumps(own).encode())]
        summaries = sorted((group for part in parts for group in part["groups"]), key=lambda group: str(group["id"]))
        tokens = sum(count for summary in summaries for count in summary["tokens"])
        metrics: dict[str, Any] = step_metrics(summaries)
        metrics |= {
            "grad_norm": update.grad_norm,
            "learning_rate": rate,
            "tokens_per_second": tokens / (updated - begun),
            "rollout_seconds": sampled - begun,
            "update_seconds": updated - sampled,
            "peak_memory": max(part["peak"] for part in parts),
            "rows": len(summaries),
        }
        return StepResult(
            metrics=metrics,
            groups=summaries,
            skipped={row: reason for part in parts for row, reason in part["skipped"].items()},
            wants_stop=any(part["stop"] for part in parts),
        )

    def _sample(self, share: Share, number: int, hooks: Hooks) -> tuple[list[ScoredGroup], dict[str, str]]:
        """This rank's groups, and its rows that could not be used, with the reason."""
        groups, skipped = [], {}
        for done, (row, vision) in enumerate(share.rows):
            _report_progress(hooks, "sample", done, share.count)
            try:
                if isinstance(vision, Exception):
                    raise vision
                prompt = encode_row(
                    self.updater.model,
                    row,
                    spec=self.spec,
                    max_prompt_tokens=self.config.max_prompt_tokens,
                    vision=vision,
                )
                groups.append(self.updater.sample(prompt, number))
            except (DataError, MediaError) as error:
                reason = str(error) if str(error).startswith(row.line) else f"{row.line}: {error}"
                if not self.config.skip_bad_rows:
                    raise type(error)(f"{reason}; --skip-bad-rows leaves such rows out") from error
                skipped[row.id] = reason
        return groups, skipped

    def _record_failure(self, number: int, error: NotFinite) -> NotFinite:
        """Write the step's rows to `failed_batch.json`; returns the error with their ids."""
        batch = next(islice(self._batches(rank=0, size=1), number - 1, None))
        rows = [self.rows[index] for index in batch]
        path = self.config.output / "failed_batch.json"
        if self.ranks.rank == 0:
            record = {"step": number, "error": str(error), "rows": [{"id": row.id, "line": row.line} for row in rows]}
            content = json.dumps(record, indent=2, ensure_ascii=False).encode("utf-8", "surrogatepass")
            replace_file(path, lambda file: file.write(content))
        ids = ", ".join(row.id for row in rows)
        return NotFinite(f"step {number}, rows {ids}: {error}; see {path}")

    def _batches(self, rank: int, size: int) -> Iterator[tuple[int, ...]]:
        """The share of one of `size` ranks in each step, without end; of one rank: whole batches."""
        config, epoch = self.config, 0
        while True:
            yield from batches(
                len(self.rows), batch_size=config.batch_size, seed=config.seed, epoch=epoch, rank=rank, ranks=size
            )
            epoch += 1


def _report_progress(hooks: Hooks, stage: str, done: int, total: int) -> None:
    if hooks.progress is not None:
        hooks.progress(stage, done, total)
