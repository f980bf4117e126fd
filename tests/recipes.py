"""Recipes that add nothing of their own: every matrix alike, and no limits for what comes out."""

from pathlib import Path

__all__ = ["write_plain"]


def write_plain(folder: Path, family: str = "qwen3_vl", more: str = "") -> Path:
    """Write `plain.toml` into `folder`; `more` stands instead of "no limits"."""
    path = folder / "plain.toml"
    path.write_text(f'family = "{family}"\nthreshold = 0.97\n{more or "verification = []"}')
    return path
