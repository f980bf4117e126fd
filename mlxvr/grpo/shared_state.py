"""What the ranks of a training run must have in common, and how they get it.

Ranks may be on machines that share no disk, and may be started with different settings. Each takes its steps from its
own copy of the model, the rows and the settings, so these must be the same. A resumed run continues from the state of
rank 0, the only rank that writes. On machines that round differently adapters can drift apart: that is noticed too.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvr.errors import ConfigError
from mlxvr.grpo.train_state import state_file
from mlxvr.runtime.distributed import ProcessGroup

__all__ = ["check_same", "have_same_bits", "shared_state"]


def check_same(ranks: ProcessGroup, values: Mapping[str, Any]) -> None:
    """Check that all ranks were given the same values.

    Args:
        ranks: all of them call this.
        values: must be the same, JSON-ready, by names that people know.

    Raises `ConfigError`, on every rank, that names what differs; also when a rank is gone.
    """
    gathered = [json.loads(data) for data in ranks.all_gather(json.dumps(values).encode())]
    first = gathered[0]
    for rank, own in enumerate(gathered):
        for name in sorted(first.keys() | own.keys()):
            if own.get(name) != first.get(name):
                raise ConfigError(
                    f"rank {rank} has {name} {own.get(name)!r}, and rank 0 has {first.get(name)!r}: give all ranks "
                    "the same model, data, settings and versions"
                )


def have_same_bits(ranks: ProcessGroup, arrays: Mapping[str, mx.array]) -> bool:
    """Whether arrays are the same on all ranks, which all call this; raises `ConfigError` when a rank is gone."""
    if ranks.size == 1:
        return True
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.array(arrays[name].view(mx.uint8)).tobytes())
    return len(set(ranks.all_gather(digest.digest()))) == 1


@contextmanager
def shared_state(ranks: ProcessGroup, output: Path) -> Iterator[Path]:
    """A folder with the state that rank 0 has in `output`; all ranks call this, whatever they have there.

    Raises `ConfigError` when it cannot be read, or a rank is gone.
    """
    if ranks.size == 1:
        yield output
        return
    try:
        data = state_file(output).read_bytes() if ranks.rank == 0 else b""
    except OSError as error:
        raise ConfigError(
            f"{state_file(output)} cannot be read ({error.strerror}): give the folder of a run"
        ) from error
    data = ranks.broadcast(data)
    if ranks.rank == 0:
        yield output
        return
    with TemporaryDirectory() as folder:
        copy = state_file(Path(folder))
        copy.parent.mkdir(parents=True)
        copy.write_bytes(data)
        del data
        yield Path(folder)
