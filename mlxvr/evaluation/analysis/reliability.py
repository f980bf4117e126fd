"""Calibration of the confidence: whether answers with confidence c are right in a share c of the cases.

The measures are the usual ones: reliability bins and expected calibration error (Guo et al. 2017), the area under the
ROC curve with the confidence as the score of a right answer, the Brier score. The early exit only needs the order of
confidences, which the AUROC measures; ECE and Brier show whether confidences can be read as probabilities.

Temperature scaling divides the logit of the confidence by one number T, fitted by log-loss. The map is strictly
increasing, so it changes no decision as long as the threshold is mapped too (up to rounding next to 0 and 1). It is
reported beside the raw confidence and never changes what the reasoner does. AUROC stays the same; ECE and Brier change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxvr.errors import DataError

__all__ = ["Bin", "auroc", "brier", "expected_calibration_error", "fit_temperature", "reliability", "scale"]

_STEEPEST = 37.0  # logit of the float next to 1; a confidence of exactly 1 counts as that when T is fitted
_FLATTEST, _SHARPEST = 1e-2, 1e2  # 1 / T


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Answers whose confidence is in [low, high) (the last bin includes `high`); an empty bin's means are None."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> list[Bin]:
    """Sort answers into bins of equal width over [0, 1].

    Args:
        confidence: float (n,), in [0, 1].
        right: bool (n,), whether each answer is right.
        bins: number of bins.
    """
    places = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    result = []
    for place in range(bins):
        chosen = places == place
        count = int(chosen.sum())
        result.append(
            Bin(
                low=place / bins,
                high=(place + 1) / bins,
                count=count,
                confidence=float(confidence[chosen].mean()) if count else None,
                accuracy=float(right[chosen].mean()) if count else None,
            )
        )
    return result


def expected_calibration_error(bins: Sequence[Bin]) -> float | None:
    """The mean distance of accuracy from confidence over bins, weighted by their counts; None: no answers."""
    total = sum(part.count for part in bins)
    gaps = [
        part.count * abs(part.accuracy - part.confidence)
        for part in bins
        if part.accuracy is not None and part.confidence is not None
    ]
    return math.fsum(gaps) / total if total else None


def auroc(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The probability that a right answer is more confident than a wrong one; ties count half.

    Args:
        confidence: float (n,).
        right: bool (n,).
        weights: float (resamples, n): how often each answer counts; None: once.

    Returns:
        float (resamples,), or (1,) without `weights`; nan where all answers are right or all are wrong.
    """
    rows = np.ones((1, len(confidence))) if weights is None else weights
    order = np.argsort(confidence, kind="stable")
    starts = np.flatnonzero(np.diff(confidence[order], prepend=-math.inf))  # where each level of confidence begins
    if not len(order):
        return np.full(len(rows), math.nan)
    good, bad = (np.add.reduceat((rows * which)[:, order], starts, axis=1) for which in (right, ~right))
    below = np.cumsum(bad, axis=1) - bad / 2
    pairs = good.sum(axis=1) * bad.sum(axis=1)
    return np.divide((good * below).sum(axis=1), pairs, out=np.full(len(rows), math.nan), where=pairs > 0)


def brier(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The squared distance of each confidence from the truth (0 or 1); the Brier score is its mean."""
    return (confidence - right) ** 2


def scale(confidence: np.ndarray, temperature: float) -> np.ndarray:
    """Divide the logits of confidences by a temperature; 0, 1/2 and 1 stay where they are."""
    with np.errstate(divide="ignore", over="ignore"):
        logits = (np.log(confidence) - np.log1p(-confidence)) / temperature
        return 1 / (1 + np.exp(-logits))


def fit_temperature(confidence: np.ndarray, right: np.ndarray) -> float:
    """The temperature, in [0.01, 100], that minimises the log-loss of the scaled confidences.

    The loss is convex in 1 / T, and bisection finds the zero of its derivative.

    Raises `DataError` unless there are right and wrong answers: otherwise the best temperature is an end of the range.
    """
    if not right.any() or right.all():
        raise DataError("a temperature needs right and wrong first answers; these are all the same: leave it out")
    with np.errstate(divide="ignore"):
        logits = np.clip(np.log(confidence) - np.log1p(-confidence), -_STEEPEST, _STEEPEST)
    low, high = math.log(_FLATTEST), math.log(_SHARPEST)
    for _ in range(100):
        middle = (low + high) / 2
        with np.errstate(over="ignore"):
            expected = 1 / (1 + np.exp(-math.exp(middle) * logits))
        if math.fsum(logits * (expected - right)) > 0:  # the loss rises: 1 / T is too great
            high = middle
        else:
            low = middle
    return math.exp(-(low + high) / 2)
