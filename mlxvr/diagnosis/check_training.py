"""Checks of training: log-probs of rollouts, and the gradient, against transformers and torch."""

from collections.abc import Iterator, Mapping

import numpy as np
from mlx.utils import tree_flatten

from mlxvr.answering.sampling_config import SamplingConfig
from mlxvr.diagnosis import reference
from mlxvr.diagnosis.findings import Finding, judge
from mlxvr.grpo.step.gradient import group_gradient, group_logprobs
from mlxvr.grpo.step.loss_config import LossConfig
from mlxvr.grpo.step.rollout import rollout

__all__ = ["check_gradient", "check_repeatable", "check_rollout"]

_TRAINING = "training would learn something else here: please report it with this output"


def check_rollout() -> Iterator[Finding]:
    """The log-probs of a rollout equal those of the training pass over the same tokens."""
    model = reference.open_model(reference.BUNDLED)
    reference.attach_known_adapter(model)
    encoded = reference.group(model, reference.prompt(model, "clip")).prompt
    drawn = rollout(model, encoded, SamplingConfig(max_tokens=24, temperature=1.0, seed=1), group_size=4)
    again = group_logprobs(model, drawn)
    error = max(
        float(np.abs(completion.logprobs - again[index, : len(completion.ids)]).max())
        for index, completion in enumerate(drawn.completions)
    )
    yield judge("rollout = training pass", error, green=1e-3, red=5e-2, what="difference in log p", advice=_TRAINING)


def check_gradient() -> Iterator[Finding]:
    """The gradient of a packed group equals that of one completion at a time in torch, in float64."""
    truth = reference.load()
    for kind in ("float32", "4bit"):
        gradient = _gradient(kind)
        expected = truth.gradient(kind)
        error = max(_norm_error(gradient[name], array) for name, array in expected.items())
        yield judge(f"packed gradient, {kind}", error, green=1e-3, red=5e-2, what="relative error", advice=_TRAINING)


def check_repeatable() -> Iterator[Finding]:
    """The same step gives the same bits three times: a resumed run then continues as if it had never stopped."""
    first, *repeats = (_gradient("float32") for _ in range(3))
    differing = sorted(
        name for name, array in first.items() if any(not np.array_equal(array, repeat[name]) for repeat in repeats)
    )
    text = "the same gradient three times" if not differing else f"{len(differing)} of {len(first)} arrays differ"
    yield Finding(
        check="training repeats to the bit",
        status="yellow" if differing else "green",
        text=text,
        advice="runs with one seed differ by rounding here, and a resumed run from an unbroken one"
        if differing
        else "",
    )


def _gradient(kind: str) -> dict[str, np.ndarray]:
    model = reference.open_model(reference.BUNDLED)
    if kind == "4bit":
        reference.quantize(model)
    reference.attach_known_adapter(model)
    made = reference.group(model, reference.prompt(model, "clip"))
    config = LossConfig(beta=0.0)
    gradient, _ = group_gradient(model, made, reference.ADVANTAGES, config=config)  # type: ignore[arg-type]
    arrays: Mapping[str, object] = dict(tree_flatten(gradient))
    return {name: np.array(array) for name, array in arrays.items()}


def _norm_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
