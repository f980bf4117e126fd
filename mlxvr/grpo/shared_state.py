"""What the ranks of a training run have to have in common, and how they come to have it.

Ranks may be on machines that share no disk and were given different things. Each takes its steps from its own copy of
the model, the rows and the settings, so that these must be the same; a run that goes on does so from the state of rank
0, the only one that writes. On machines that round differently adapters can drift apart by bits: that is noticed too.
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


def check_same(ranks: ProcessGroup, told: Mapping[str, Any]) -> None:
    """Make sure that all ranks were given the same.

    Args:
        ranks: all of them call this.
        told: what has to be the same, JSON-ready, by the name that people know it by.

    Raises `ConfigError`, on every rank alike, that names what differs; also when a rank is gone.
    """
    every = [json.loads(one) for one in ranks.all_gather(json.dumps(told).encode())]
    for rank, one in enumerate(every):
        for name in sorted(every[0].keys() | one.keys()):
            if one.get(name) != every[0].get(name):
                raise ConfigError(
                    f"rank {rank} has {name} {one.get(name)!r}, and rank 0 has {every[0].get(name)!r}: give all ranks "
                    "the same model, data, settings and versions"
                )


def have_same_bits(ranks: ProcessGroup, arrays: Mapping[str, mx.array]) -> bool:
    """Whether arrays are the same on all ranks, which all ask; raises `ConfigError` when one is gone."""
    if ranks.size == 1:
        return True
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.array(arrays[name].view(mx.uint8)).tobytes())
    return len(set(ranks.all_gather(digest.digest()))) == 1


@contextmanager
def shared_state(ranks: ProcessGroup, output: Path) -> Iterator[Path]:
    """A folder with the state that rank 0 has in `output`; all ranks ask, whatever they have there.

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
