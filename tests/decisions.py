"""The early exit, written a second time for tests: what a row answers at a threshold, and what that costs."""

from types import SimpleNamespace


def decision(sample, threshold):
    """The text, tokens and seconds of a row at a threshold; the first answer counts from the threshold on."""
    reasoned = sample.confidence is None or sample.confidence < threshold
    if reasoned:
        text = sample.text if sample.second is None else sample.second
        return SimpleNamespace(reasoned=True, text=text, tokens=sample.total_tokens, seconds=sample.total_seconds)
    return SimpleNamespace(reasoned=False, text=sample.first, tokens=sample.first_tokens, seconds=sample.first_seconds)
