"""One step of GRPO: completions, their rewards, and an update of the adapter."""
