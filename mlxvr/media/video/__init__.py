"""Read video files: index their frames, and decode only the frames that are wanted."""
