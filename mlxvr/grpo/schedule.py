"""The learning rate of every step, as a function of its number alone, so that a resumed run needs only the number."""

import math

__all__ = ["learning_rate"]


def learning_rate(step: int, *, highest: float, kind: str, warmup: int, total: int) -> float:
    """The rate of a step.

    Args:
        step: from 1.
        highest: the rate after the warm-up.
        kind: "constant", or "cosine": half a cosine from the highest down to 0 after the last step.
        warmup: steps over which the rate rises: `highest * step / (warmup + 1)`, so that the step after them is the
            first of the highest.
        total: steps of the run.
    """
    if step <= warmup:
        return highest * step / (warmup + 1)
    if kind == "constant":
        return highest
    done = (step - warmup - 1) / max(1, total - warmup)
    return highest * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
