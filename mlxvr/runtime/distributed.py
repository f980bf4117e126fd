"""Communication between the processes of one distributed run, over MLX's own distributed engine.

    mlx.launch -n 2 -- python -m mlxvr.eval --data clips.jsonl --output run
    mlx.launch --hostfile hosts.json -- python -m mlxvr.train --data train.jsonl --output run

Ranks exchange data through collectives, which every rank must enter in the same order. If a rank is gone, its
collective fails on the others (with the ring at once), and they end with an error that says what to do. The result of
each collective is evaluated by `mx.eval` before anything else reads it: NumPy can evaluate an array too, but returns
zeros if a rank is gone.
"""

from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from mlxvr.errors import ConfigError

__all__ = ["ProcessGroup"]

_MESSAGE_NUMBERS = 2**23  # float32 numbers summed in one message: 32 MiB, as MLX itself groups gradients
_MESSAGE_BYTES = 2**25


class ProcessGroup:
    """This process's rank among the processes of a distributed run; the only rank if no launcher started it."""

    def __init__(self) -> None:
        """Raises `ConfigError` if the other ranks cannot be reached."""
        try:
            self._group = mx.distributed.init()
        except RuntimeError as error:
            raise ConfigError(
                f"the other ranks cannot be reached ({error}): check the hosts of the launcher"
            ) from error
        self.rank: int = self._group.rank()
        self.size: int = self._group.size()
        # Why a rank is gone. No collective is entered again then, as MLX might wait for ever.
        self._lost: str | None = None

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return the bytes of every rank, in the order of ranks, on every rank; waits for all ranks.

        Raises `ConfigError` if a rank is gone.
        """
        if self.size == 1:
            return [data]
        sizes = self._gather_array(np.array([len(data)], np.int32))
        longest = max(1, int(sizes.max()))
        padded = np.zeros(longest, np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        gathered = self._gather_array(padded).reshape(self.size, longest)
        return [row[:size].tobytes() for row, size in zip(gathered, sizes)]

    def broadcast(self, data: bytes) -> bytes:
        """Return the bytes of rank 0 on every rank; the data of the other ranks is ignored.

        Raises `ConfigError` if a rank is gone.
        """
        if self.size == 1:
            return data
        own = np.frombuffer(data if self.rank == 0 else b"", np.uint8)
        size = int.from_bytes(self.all_gather(len(own).to_bytes(8))[0])
        parts = []
        for start in range(0, size, _MESSAGE_BYTES):
            part = np.zeros(min(_MESSAGE_BYTES, size - start), np.uint8)
            if self.rank == 0:
                part[:] = own[start : start + len(part)]
            parts.append(self._gather_array(part)[: len(part)].tobytes())
        return b"".join(parts)

    def all_sum(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return each array's sum over the ranks, in float32, with the same bits on every rank.

        Args:
            arrays: arrays by name, with the same names and shapes on every rank.

        Raises `ConfigError` if a rank is gone.
        """
        if self.size == 1 or not arrays:
            return {name: array.astype(mx.float32) for name, array in arrays.items()}
        names = sorted(arrays)
        flat = mx.concatenate([arrays[name].astype(mx.float32).reshape(-1) for name in names])
        parts = []
        for start in range(0, flat.size, _MESSAGE_NUMBERS):
            parts.append(self._evaluate(mx.distributed.all_sum, flat[start : start + _MESSAGE_NUMBERS]))
        ends = np.cumsum([arrays[name].size for name in names])[:-1].tolist()
        summed = mx.split(mx.concatenate(parts), ends)
        return {name: part.reshape(arrays[name].shape) for name, part in zip(names, summed)}

    def barrier(self) -> None:
        """Wait until every rank has reached this point; raises `ConfigError` if a rank is gone."""
        self.all_gather(b"")

    def _gather_array(self, values: np.ndarray) -> np.ndarray:
        return np.array(self._evaluate(mx.distributed.all_gather, mx.array(values)))

    def _evaluate(self, collective: Callable[..., mx.array], array: mx.array) -> mx.array:
        if self._lost is not None:
            raise _rank_is_gone(self._lost)
        try:
            mx.eval(array)
            # On the CPU: a GPU that waits for a message that never comes would keep the process from ending.
            result = collective(array, group=self._group, stream=mx.cpu)
            mx.eval(result)
        except RuntimeError as error:
            self._lost = str(error)
            raise _rank_is_gone(self._lost) from error
        return result


def _rank_is_gone(reason: str) -> ConfigError:
    return ConfigError(
        f"another rank is gone ({reason}): read its error, then start all ranks again; the work continues from where "
        "it was last saved"
    )
