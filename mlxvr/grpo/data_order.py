"""The order in which rows are trained on: shuffled by a seed, the same whatever the number of ranks.

Place i of an epoch is decided by a digest of seed, epoch and i alone, not by a random generator whose algorithm could
change between versions of Python; so a run can be resumed anywhere and on anything.

Remainder. Every row comes exactly once per epoch; none is repeated or dropped. If the count is no multiple of the batch
size, the last batch of the epoch is smaller. The rows of a batch are dealt to the ranks in turn, so that their shares
differ by at most one row, and a rank may get no row of a small batch. All ranks have the same number of batches, which
keeps them in step. Averaging gradients over ranks must weigh each rank by its rows, or sum and divide by the rows of
the batch (`batches` with one rank gives it).
"""

import hashlib

from mlxvr.errors import ConfigError

__all__ = ["batches"]


def batches(
    count: int, *, batch_size: int, seed: int, epoch: int, rank: int = 0, ranks: int = 1
) -> list[tuple[int, ...]]:
    """The batches of an epoch, as indices of rows.

    Args:
        count: of rows.
        batch_size: rows of a batch, over all ranks together.
        seed, epoch: what decides the order.
        rank: whose share is wanted.
        ranks: how many share a batch.

    Returns:
        A tuple for each batch, (rank's rows,); with one rank the batches themselves. It may be empty for one rank of
        several, where the batch has fewer rows than there are ranks.

    Raises `ConfigError` when a number makes no sense.
    """
    for name, value in (("count", count), ("batch_size", batch_size), ("ranks", ranks)):
        if value < 1:
            raise ConfigError(f"{name} is {value}: expected at least 1")
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank {rank} is none of {ranks} ranks: expected 0 to {ranks - 1}")
    order = sorted(range(count), key=lambda index: _place(seed, epoch, index))
    return [tuple(order[start : start + batch_size][rank::ranks]) for start in range(0, count, batch_size)]


def _place(seed: int, epoch: int, index: int) -> bytes:
    return hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest()
