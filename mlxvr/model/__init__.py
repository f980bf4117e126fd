"""The network and its words: loading, prompts, positions, KV cache and decoding."""
