"""Whether an answer is right: choices, numbers, formulas, intervals; strict for rewards, lenient for evaluation."""
