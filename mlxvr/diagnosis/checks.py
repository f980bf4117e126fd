"""All checks by name, in the order in which they run: cheap and informative ones first."""

from collections.abc import Callable, Iterator
from importlib import import_module

from mlxvr.diagnosis.findings import Finding

__all__ = ["CHECKS", "SPEED", "Check", "find"]

Check = Callable[[], Iterator[Finding]]

SPEED = "speed"
CHECKS = {
    "machine": "environment:check_machine",
    "versions": "environment:check_versions",
    "frames": "check_decoding:check_frames",
    "answer": "check_decoding:check_answer",
    "logits": "check_logits:check_logits",
    "products": "check_logits:check_quantized_products",
    "packing": "check_logits:check_packing",
    "chunks": "check_logits:check_chunks",
    "follow-up": "check_logits:check_follow_up",
    "rollout": "check_training:check_rollout",
    "gradient": "check_training:check_gradient",
    "repeats": "check_training:check_repeatable",
    "reasoners": "check_engine:check_two_reasoners",
    "cancel": "check_engine:check_cancel",
    "memory": "check_engine:check_memory",
    SPEED: "check_speed:check_speed",
}


def find(name: str) -> Check:
    """The check of this name; its imports run now, so that a broken package becomes a finding of its own."""
    module, _, function = CHECKS[name].partition(":")
    check: Check = getattr(import_module(f"mlxvr.diagnosis.{module}"), function)
    return check
