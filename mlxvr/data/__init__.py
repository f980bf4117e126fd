"""Datasets: rows of questions about clips, readers of public files, and reading the media of a row."""
