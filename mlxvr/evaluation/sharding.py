"""One run over several processes: each asks its share of the clips, and their samples are merged.

There are two ways to have several processes. Ranks are started from outside, on one machine or many, and talk through
`mx.distributed`:

    mlx.launch -n 2 -- python -m mlxvr.eval --data clips.jsonl --output run
    mlx.launch --hosts a,b -- python -m mlxvr.eval ...

Workers (`--workers N`) are started here, on this machine. Either way the shard 0 writes `samples.jsonl` and shard r
`samples.rank<r>.jsonl`, so that nobody waits for anybody and each file is as safe as that of a single run. At the end,
and before a run that continues after a stop, all samples become one file. Ranks exchange them as bytes, so that their
disks need not be the same. Each run shares out anew the clips that are left, so the number of processes may change. A
rank that has done its share keeps a core busy until all have (MLX's ring polls); when one fails, the launcher ends all.
"""

import contextlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvr.errors import ConfigError, MlxvrError
from mlxvr.evaluation.samples import Sample, check_run, read_samples
from mlxvr.runtime.distributed import ProcessGroup
from mlxvr.storage.paths import list_visible

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

__all__ = ["MAIN", "collect", "shard_file", "shard_files", "workers"]

MAIN = "samples.jsonl"
_POLL_SECONDS = 0.2  # seconds between polls of the workers


def shard_file(output: Path, shard: int) -> Path:
    """Where a shard writes its samples."""
    return output / (f"samples.rank{shard}.jsonl" if shard else MAIN)


def shard_files(output: Path) -> list[Path]:
    """The files of all shards but the first that are in a folder."""
    return list_visible(output, "samples.rank*.jsonl")


def collect(output: Path, run: Mapping[str, Any], ranks: ProcessGroup) -> dict[str, Sample]:
    """Every sample that any rank has on its disk, by id; of two samples of a row, the one that did not fail.

    Raises `ConfigError` when one was made with other settings than `run`, `DataError` when a file is damaged.
    """
    samples: dict[str, Sample] = {}
    for path in [output / MAIN, *shard_files(output)]:
        if path.is_file():
            check_run(path, run)
            _add(samples, read_samples(path))
    own_records = json.dumps([sample.to_dict() for sample in samples.values()]).encode()
    for records in ranks.all_gather(own_records) if ranks.size > 1 else []:
        _add(samples, [Sample(**record) for record in json.loads(records)])
    return samples


def _add(samples: dict[str, Sample], more: Sequence[Sample]) -> None:
    for sample in more:
        if sample.id not in samples or samples[sample.id].error is not None:
            samples[sample.id] = sample


Work = Callable[[int, Callable[[], None]], None]


@contextlib.contextmanager
def workers(count: int, work: Work) -> "Iterator[WorkerPool]":
    """Run `work(shard, step)` for the shards 1 .. count - 1 in processes of their own; they end with the block.

    `work` must be importable (a `functools.partial` of a module's function) and calls `step` for each row.
    """
    pool = WorkerPool(count, work)
    try:
        yield pool
    finally:
        pool.stop()


class WorkerPool:
    """Processes at work; see `workers`."""

    def __init__(self, count: int, work: Work) -> None:
        self._pipes: dict[BaseProcess, Connection] = {}
        self.steps = 0  # rows that the workers have done
        for shard in range(1, count):
            self.start_worker(shard, work)

    def start_worker(self, shard: int, work: Work) -> None:
        """Start the worker of a shard."""
        context = multiprocessing.get_context("spawn")  # MLX does not survive a fork
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(work, shard, theirs), name=f"mlxvr-worker-{shard}")
        process.start()
        theirs.close()
        self._pipes[process] = ours

    def poll(self) -> bool:
        """Read the messages of the workers and count their steps; False once all have ended.

        Raises what the first of them to fail raised, as an error of the same kind if it is an `MlxvrError`.
        """
        for process, pipe in list(self._pipes.items()):
            failure: MlxvrError | str | None = None
            try:
                while pipe.poll() and failure is None:
                    failure = pipe.recv()
                    self.steps += failure is None
            except EOFError:  # it has ended, or was killed
                process.join()
                del self._pipes[process]
                if process.exitcode:
                    raise _died(process) from None
            if isinstance(failure, MlxvrError):
                raise failure
            if failure is not None:
                raise RuntimeError(f"{process.name} failed: {failure}")
        return bool(self._pipes)

    def wait(self, step: Callable[[], None]) -> None:
        """Wait until all workers have ended, and call `step` now and then; raises as `poll`."""
        while self.poll():
            multiprocessing.connection.wait(list(self._pipes.values()), _POLL_SECONDS)
            step()
        step()

    def stop(self) -> None:
        """End the workers that still run; what they have written stays."""
        for process in self._pipes:
            process.terminate()
        for process, pipe in self._pipes.items():
            process.join()
            pipe.close()
        self._pipes.clear()


def _died(process: "BaseProcess") -> ConfigError:
    code = process.exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
    return ConfigError(
        f"{process.name} {how}, as when memory runs out: use fewer workers and run again; it goes on where it stopped"
    )


def _serve(work: Work, shard: int, pipe: Connection) -> None:
    """A worker's process; ends with its parent, however that ends."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        work(shard, lambda: pipe.send(None))
    except KeyboardInterrupt:
        pass
    except MlxvrError as error:
        pipe.send(type(error)(str(error)))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
    finally:
        pipe.close()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
