"""Readers of moments in videos: descriptions to locate, and questions with the moments of their answer (NeXT-GQA).

Swapped ends are put in order. A record whose moments all have no length is an error.
"""

from collections.abc import Mapping
from typing import Any

from mlxvr.data.tables import as_text
from mlxvr.data.training_sets.columns import Fields, Source, interval, media_path, options, text
from mlxvr.data.training_sets.wording import choice, plain_question

__all__ = ["read_moments", "read_nextgqa", "read_timer1"]


def read_moments(record: Mapping[str, Any], source: Source) -> Fields:
    """Charades-STA and ActivityNet-TVG: `description`, `timestamps`, `video`."""
    return _moment(record, "description", "timestamps")


def read_timer1(record: Mapping[str, Any], source: Source) -> Fields:
    """TimeR1: `sentence`, `timestamp`, `video`."""
    return _moment(record, "sentence", "timestamp")


def read_nextgqa(record: Mapping[str, Any], source: Source) -> Fields:
    """NeXT-GQA: `question`, `options`, `answer` (a letter or an option), `timestamps`, `video`."""
    choices = options(record.get("options"))
    return {
        "question": plain_question(text(record, "question")),
        "options": choices,
        "answer": [choice(as_text(record.get("answer")), choices), interval(record, "timestamps")],
        "kind": "gqa",
        "video": media_path(record.get("video"), "video"),
        "category": as_text(record.get("type")),
    }


def _moment(record: Mapping[str, Any], description: str, moments: str) -> Fields:
    return {
        "question": " ".join(plain_question(text(record, description)).split()),
        "answer": interval(record, moments),
        "kind": "iou",
        "video": media_path(record.get("video"), "video"),
    }
