"""From tokens to answers: boxes, reasoning, confidence, and the loop that decides whether to reason. Pure Python."""
