"""Processes that were started together and work on one thing, over MLX's own distributed engine.

    mlx.launch -n 2 -- python -m mlxvr.eval --data clips.jsonl --output run
    mlx.launch --hostfile hosts.json -- python -m mlxvr.train --data train.jsonl --output run

What they tell each other goes through collectives, which every rank must enter in the same order. A rank that is gone
is noticed there (the ring says so at once), and the others end with an error that says what to do. Each collective is
evaluated by `mx.eval` before anything else looks at it: NumPy, which can evaluate an array as well, returns zeros where
a rank is gone.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from mlxvr.errors import ConfigError

__all__ = ["Ranks"]

_AT_ONCE = 2**23  # numbers that are summed in one message: 32 MiB, as MLX itself groups gradients
_BYTES_AT_ONCE = 2**25


class Ranks:
    """This process among those that were started together; alone where no launcher did."""

    def __init__(self) -> None:
        """Raises `ConfigError` when the others cannot be reached."""
        try:
            self._group = mx.distributed.init()
        except RuntimeError as error:
            raise ConfigError(
                f"the other ranks cannot be reached ({error}): check the hosts of the launcher"
            ) from error
        self.rank: int = self._group.rank()
        self.size: int = self._group.size()
        self._lost: str | None = None  # why a rank is gone: no collective is entered again, as MLX may wait for ever

    def gather(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, in their order, on every rank; waits for all of them.

        Raises `ConfigError` when a rank is gone.
        """
        if self.size == 1:
            return [data]
        sizes = self._all_gather(np.array([len(data)], np.int32))
        longest = max(1, int(sizes.max()))
        padded = np.zeros(longest, np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        every = self._all_gather(padded).reshape(self.size, longest)
        return [row[:size].tobytes() for row, size in zip(every, sizes)]

    def share(self, data: bytes) -> bytes:
        """The bytes of rank 0, on every rank; what the others give does not matter.

        Raises `ConfigError` when a rank is gone.
        """
        if self.size == 1:
            return data
        own = np.frombuffer(data if self.rank == 0 else b"", np.uint8)
        size = int.from_bytes(self.gather(len(own).to_bytes(8))[0])
        parts = []
        for start in range(0, size, _BYTES_AT_ONCE):
            part = np.zeros(min(_BYTES_AT_ONCE, size - start), np.uint8)
            if self.rank == 0:
                part[:] = own[start : start + len(part)]
            parts.append(self._all_gather(part)[: len(part)].tobytes())
        return b"".join(parts)

    def sum(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The sum over the ranks of each array, float32, on every rank; the same bits on all of them.

        Args:
            arrays: the same names and shapes on every rank.

        Raises `ConfigError` when a rank is gone.
        """
        if self.size == 1 or not arrays:
            return {name: array.astype(mx.float32) for name, array in arrays.items()}
        names = sorted(arrays)
        flat = mx.concatenate([arrays[name].astype(mx.float32).reshape(-1) for name in names])
        parts = []
        for start in range(0, flat.size, _AT_ONCE):
            parts.append(self._evaluate(mx.distributed.all_sum, flat[start : start + _AT_ONCE]))
        ends = np.cumsum([arrays[name].size for name in names])[:-1].tolist()
        summed = mx.split(mx.concatenate(parts), ends)
        return {name: part.reshape(arrays[name].shape) for name, part in zip(names, summed)}

    def wait(self) -> None:
        """Return when every rank has come this far; raises `ConfigError` when one is gone."""
        self.gather(b"")

    def _all_gather(self, values: np.ndarray) -> np.ndarray:
        return np.array(self._evaluate(mx.distributed.all_gather, mx.array(values)))

    def _evaluate(self, collective: Callable[..., mx.array], array: mx.array) -> mx.array:
        if self._lost is not None:
            raise _rank_is_gone(self._lost)
        try:
            mx.eval(array)
            # On the host: a GPU that waits for a message that never comes would keep the process from ending.
            result = collective(array, group=self._group, stream=mx.cpu)
            mx.eval(result)
        except RuntimeError as error:
            self._lost = str(error)
            raise _rank_is_gone(self._lost) from error
        return result


def _rank_is_gone(reason: str) -> ConfigError:
    return ConfigError(
        f"another rank is gone ({reason}): see what it said, then start all of them again; the work goes on where "
        "it was last saved"
    )
