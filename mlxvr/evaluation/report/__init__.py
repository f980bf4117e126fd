"""The report of an evaluation: one HTML page, the same figures as JSON, and plots."""
