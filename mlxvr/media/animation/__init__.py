"""Animated GIF, PNG, WebP and AVIF files as clips."""
