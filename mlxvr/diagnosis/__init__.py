"""Does this machine compute what it should, and how fast: what `python -m mlxvr.doctor` runs and reports."""
