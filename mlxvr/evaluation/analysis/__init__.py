"""What the samples of a run show: scores, intervals, calibration, thresholds, comparisons."""
