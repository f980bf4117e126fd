"""What a training run reports: metrics, a live view, curves and a summary."""
