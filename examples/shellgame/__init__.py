"""A synthetic world, its videos, and the tiny Qwen3-VL that is trained on them from scratch.

Run the scripts from the folder above this one: `python -m shellgame.train`, `python -m shellgame.evaluate`.
"""
