"""The one place of sampling's options: what it refuses, and that requests have its fields and its defaults."""

import dataclasses

import pytest

from mlxvr.answering.loop import AskRequest
from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.errors import ConfigError


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": "1"}, "temperature '1' is no number"),
        ({"temperature": float("inf")}, "temperature inf cannot be used"),
        ({"temperature": -0.5}, "temperature -0.5 cannot be used"),
        ({"top_p": 0.0}, r"top_p 0.0 is outside \(0, 1\]"),
        ({"top_p": True}, "top_p True is no number"),
        ({"max_tokens": 0}, "max_tokens 0 leaves no room"),
        ({"max_tokens": 2.5}, "max_tokens 2.5 is no whole number"),
        ({"seed": -1}, "seed -1 cannot be used"),
        ({"seed": 2**64}, "seed 18446744073709551616 cannot be used"),
    ],
)
def test_unusable_values_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**wrong)
    with pytest.raises(ConfigError, match=message):
        AskRequest("What?", **wrong)


def test_usable_values_are_kept():
    values = {"max_tokens": 1, "temperature": 0.5, "top_p": 1, "seed": 2**64 - 1}
    assert dataclasses.asdict(SamplingConfig(**values)) == values
    assert vars(AskRequest("What?", **values)).items() >= values.items()
