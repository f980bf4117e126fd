"""What the early exit buys, measured: rows, samples, grades, figures, thresholds, reports."""
