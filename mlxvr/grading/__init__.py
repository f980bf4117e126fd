"""Judging answers (choices, numbers, formulas, intervals): strictly for rewards, leniently for evaluation."""
