"""A knapsack: one option for each item, so that the sizes fit into a budget and the costs are least."""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["assign"]

_UNITS = 1 << 16  # the most steps of size that are told apart


def assign(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """Pick one option of each item, so that the sizes fit into a budget and the sum of costs is least.

    Dynamic programming over sizes solves it: exactly where the sizes have a common divisor that is not too small, as
    those of a network's matrices have, otherwise up to one part in 65,536 of the range of sizes. A larger budget never
    costs more.

    Args:
        options: for each item its options as (size, cost).
        budget: the largest sum of sizes.

    Returns:
        The index of each item's option. Raises `ValueError` when the smallest sizes do not fit.
    """
    smallest = [min(size for size, _ in item) for item in options]
    room = budget - sum(smallest)
    if room < 0:
        raise ValueError(f"the smallest sizes take {sum(smallest)}, the budget is {budget}")
    extra = [[size - least for size, _ in item] for item, least in zip(options, smallest)]
    span = sum(max(item) for item in extra)
    unit = math.gcd(*(size for item in extra for size in item)) or 1
    unit *= max(1, math.ceil(span / unit / _UNITS))
    places = min(room, span) // unit + 1
    best = np.zeros(places)
    picks = np.zeros((len(options), places), dtype=np.int16)
    for index, item in enumerate(options):
        extended = np.full(places, np.inf)
        for option, (_, cost) in enumerate(item):
            step = -(-extra[index][option] // unit)
            if step >= places:
                continue
            costs = best[: places - step] + cost
            better = costs < extended[step:]
            extended[step:][better] = costs[better]
            picks[index, step:][better] = option
        best = extended
    chosen, place = [0] * len(options), places - 1
    for index in reversed(range(len(options))):
        chosen[index] = int(picks[index, place])
        place -= -(-extra[index][chosen[index]] // unit)
    return chosen
