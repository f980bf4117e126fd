"""95% intervals of figures, by the percentile bootstrap over clips.

Rows are not independent: questions about one clip share its difficulty, and the two clips of a minimal pair are right
together or not at all. The bootstrap therefore draws clusters with replacement: rows that share a clip or a pair. Where
every row has a clip of its own, this is the bootstrap over rows.

Figures are means over rows, so a resample is a vector of weights, one per cluster, and a thousand resamples are one
matrix product. A difference of two modes or two runs is taken row by row before it is averaged, which makes it paired.
A percentile interval over few clusters is too narrow; a single cluster has no interval.

Where all rows agree, a percentile interval has no width, which would read as certainty. A share of 0 or 1 therefore
gets Wilson's interval over the clusters (`Bootstrap.share`); any other share whose interval has no width gets none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["Bootstrap", "Clustered", "Estimate", "clusters_of", "not_none", "wilson"]

_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its 95% interval; `low` and `high` are None where there is no interval (fewer than two clusters)."""

    value: float
    low: float | None = None
    high: float | None = None


class Clustered(Protocol):
    """What clusters are made from: a row of a dataset, or its sample."""

    @property
    def media(self) -> str:
        """Path of the video or image; "" without one."""

    @property
    def pair(self) -> str:
        """Name of the minimal pair; "" without one."""


class Bootstrap:
    """Resamples of the clusters of a set of rows.

    Args:
        clusters: int (n,), the cluster of each row, numbered from 0.
        count: number of resamples; 0: no intervals.
        seed: makes the resamples repeatable.
    """

    def __init__(self, clusters: np.ndarray, *, count: int, seed: int) -> None:
        self._clusters = clusters
        size = int(clusters.max(initial=-1)) + 1
        drawn = count if size > 1 else 0
        generator = np.random.default_rng(seed)
        # (resamples, clusters): how often each cluster was drawn
        self._weights = generator.multinomial(size, np.full(size, 1 / max(1, size)), size=drawn).astype(np.float64)

    @property
    def row_weights(self) -> np.ndarray:
        """How often each row was drawn, float (resamples, rows)."""
        return self._weights[:, self._clusters]

    def mean(self, values: np.ndarray, among: np.ndarray | None = None) -> Estimate | None:
        """The mean of `values` (n,) over the rows in `among` (bool (n,); None: all); None if there are no such rows."""
        chosen = np.ones(len(values), dtype=bool) if among is None else among
        if not chosen.any():
            return None
        size = self._weights.shape[1]
        sums = self._weights @ np.bincount(self._clusters[chosen], weights=values[chosen], minlength=size)
        counts = self._weights @ np.bincount(self._clusters[chosen], minlength=size)
        filled = counts > 0  # a resample may hold none of these rows
        return self.interval(float(values[chosen].mean()), sums[filled] / counts[filled])

    def share(self, values: np.ndarray, among: np.ndarray | None = None) -> Estimate | None:
        """As `mean`, for values from 0 to 1; an interval without width is replaced (see the module)."""
        estimate = self.mean(values, among)
        if estimate is None or estimate.low is None or estimate.low != estimate.high:
            return estimate
        if estimate.value not in (0.0, 1.0):
            return Estimate(value=estimate.value)
        count = len(np.unique(self._clusters if among is None else self._clusters[among]))
        low, high = wilson(estimate.value * count, count)
        return Estimate(value=estimate.value, low=low, high=high)

    def interval(self, value: float, draws: np.ndarray) -> Estimate:
        """A value with the interval that its resamples span."""
        if not len(draws):
            return Estimate(value=value)
        low, high = np.percentile(draws, _PERCENTILES)
        return Estimate(value=value, low=float(low), high=float(high))


def not_none(estimate: Estimate | None) -> Estimate:
    """The figure, where the caller knows that there are rows."""
    assert estimate is not None
    return estimate


def wilson(successes: float, count: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share; `count` is at least 1."""
    z = 1.959964
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def clusters_of(samples: Sequence[Clustered]) -> np.ndarray:
    """The cluster of each sample, int (n,): samples of one clip or of one pair have the same."""
    parents = list(range(len(samples)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    seen: dict[tuple[str, str], int] = {}
    for index, sample in enumerate(samples):
        for key in (("media", sample.media), ("pair", sample.pair)):
            if key[1]:
                parents[root(index)] = root(seen.setdefault(key, index))
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(root(index), len(numbers)) for index in range(len(samples))], dtype=np.int64)
