"""The process and its device: threads, ranks, memory, and the callbacks that report progress or stop long work."""
