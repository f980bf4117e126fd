"""Figures as text, each worked by hand."""

import math

import pytest

from mlxvr.evaluation import formatting
from mlxvr.evaluation.analysis.bootstrap import Estimate


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formatting.share(Estimate(value=0.8434, low=0.82, high=0.86), 2000), "84.3%"),
        (formatting.share(Estimate(value=0.8434, low=0.76, high=0.91), 2000), "84%"),
        (formatting.share(Estimate(value=0.8434, low=0.84, high=0.85), 20), "84%"),
        (formatting.share(0.8434, 999), "84%"),
        (formatting.share(0.8434, 1000), "84.3%"),
        (formatting.share(None), "–"),
        (formatting.interval(Estimate(value=0.8, low=0.76, high=0.91), 200), "76 to 91"),
        (formatting.interval(Estimate(value=0.8, low=0.78, high=0.82), 200), "78.0 to 82.0"),
        (formatting.interval(Estimate(value=0.5, low=0.5, high=0.5), 200), ""),
        (formatting.interval(Estimate(value=1, low=None, high=None), 200), ""),
        (formatting.points(Estimate(value=-0.008, low=-0.02, high=0.01), 500), "−0.8"),
        (formatting.points(Estimate(value=-0.001, low=-0.2, high=0.1), 500), "0"),
        (formatting.points_interval(Estimate(value=0, low=-0.021, high=0.005), 500), "−2.1 to +0.5"),
        (formatting.tokens(1234.5), "1,234"),
        (formatting.tokens(6.54), "6.5"),
        (formatting.seconds(0.354), "0.35 s"),
        (formatting.seconds(4.54), "4.5 s"),
        (formatting.seconds(0), "0 s"),
        (formatting.confidence(0.97), "0.97"),
        (formatting.confidence(0.99997), "0.99997"),
        (formatting.confidence(math.nextafter(1, 2)), "above 1"),
        (formatting.confidence(1.0), "1"),
        (formatting.plain(0.8765, 1000), "0.876"),
        (formatting.plain(0.8765, 10), "0.88"),
        (formatting.count(1, "clip"), "1 clip"),
        (formatting.count(2000, "clip"), "2,000 clips"),
    ],
)
def test_numbers(written, expected):
    assert written == expected
