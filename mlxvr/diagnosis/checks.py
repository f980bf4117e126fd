"""All checks by name, in the order in which they run: what is cheap and tells most comes first."""

from collections.abc import Callable, Iterator
from importlib import import_module

from mlxvr.diagnosis.findings import Finding

__all__ = ["CHECKS", "SPEED", "Check", "find"]

Check = Callable[[], Iterator[Finding]]

SPEED = "speed"
CHECKS = {
    "machine": "environment:check_machine",
    "versions": "environment:check_versions",
    "frames": "media:check_frames",
    "answer": "media:check_answer",
    "logits": "numbers:check_logits",
    "products": "numbers:check_quantized_products",
    "packing": "numbers:check_packing",
    "chunks": "numbers:check_chunks",
    "follow-up": "numbers:check_follow_up",
    "rollout": "training:check_rollout",
    "gradient": "training:check_gradient",
    "repeats": "training:check_repeatable",
    "reasoners": "engine:check_two_reasoners",
    "cancel": "engine:check_cancel",
    "memory": "engine:check_memory",
    SPEED: "speed:check_speed",
}


def find(name: str) -> Check:
    """The check of this name; what it needs is imported now, so that a broken package is a finding of its own."""
    module, _, function = CHECKS[name].partition(":")
    check: Check = getattr(import_module(f"mlxvr.diagnosis.{module}"), function)
    return check
