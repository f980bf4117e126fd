"""The process and its device: threads, ranks, memory, and how long work reports progress and is stopped."""
