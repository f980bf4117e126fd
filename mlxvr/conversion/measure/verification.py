"""The result of verifying a converted model: figures, a table of probes, and the figures beyond their limits.

`verify` explains what is measured and why.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxvr.checkpoint.recipe import VerificationLimits

__all__ = ["Divergence", "ProbeResult", "VerificationReport", "compare_logits"]


@dataclass(frozen=True)
class Divergence:
    """The difference of a model's logits from the expected ones, over some tokens.

    Attributes:
        tokens: number of tokens.
        logits_error: mean over tokens of |actual - expected| / |expected|, Euclidean, of centred logits.
        largest_error: the largest of these errors.
        top1: share of tokens whose most likely token is the same.
        kl: mean KL(expected || actual) in nats.
    """

    tokens: int
    logits_error: float
    largest_error: float
    top1: float
    kl: float


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """The result of one probe.

    Attributes:
        name: the probe's.
        prompt_tokens: number of tokens in its prompt.
        divergence: of the logits.
        source_answer, converted_answer: the normalised first answers; None: no answer that can be scored.
        source_confidence, converted_confidence: of each model's own first answer; if one of the answers is None, of the
            source's tokens under each model.
        source_exits, converted_exits: whether each model stops at its first answer; None: neither closed a box.
    """

    name: str
    prompt_tokens: int
    divergence: Divergence
    source_answer: str | None
    converted_answer: str | None
    source_confidence: float
    converted_confidence: float
    source_exits: bool | None
    converted_exits: bool | None

    @property
    def drift(self) -> float:
        """|converted - source| of the confidence."""
        return abs(self.converted_confidence - self.source_confidence)

    @property
    def answers_differ(self) -> bool:
        """Whether both models stop, with different answers."""
        both = bool(self.source_exits and self.converted_exits)
        return both and _folded(self.source_answer) != _folded(self.converted_answer)

    @property
    def flipped(self) -> bool:
        """Whether only one of the models stops, or both stop with different answers."""
        return self.source_exits != self.converted_exits or self.answers_differ


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """The differences of a converted model from its source.

    Attributes:
        source, converted: the two folders or Hub ids.
        threshold: confidence from which a first answer is taken.
        probes: the result of each probe.
        source_run: "in memory", or "layer by layer" with the amount of weights that stayed in memory.
        seconds: duration of the whole verification.
        peak_memory: the most bytes that MLX's allocator held.
    """

    source: str
    converted: str
    threshold: float
    probes: tuple[ProbeResult, ...]
    source_run: str
    seconds: float
    peak_memory: int

    @property
    def tokens(self) -> int:
        """Tokens whose logits were compared."""
        return sum(probe.divergence.tokens for probe in self.probes)

    @property
    def logits_error(self) -> float:
        """Relative error of the logits, mean over tokens."""
        return self._over_tokens(lambda divergence: divergence.logits_error)

    @property
    def largest_logits_error(self) -> float:
        """Relative error of the logits of the worst token."""
        return float(np.max([probe.divergence.largest_error for probe in self.probes]))

    @property
    def top1(self) -> float:
        """Share of tokens whose most likely token is the same."""
        return self._over_tokens(lambda divergence: divergence.top1)

    @property
    def kl(self) -> float:
        """KL(source || converted), nats per token."""
        return self._over_tokens(lambda divergence: divergence.kl)

    @property
    def confidence_drift(self) -> float:
        """Mean over probes of |converted - source|."""
        return float(np.mean([probe.drift for probe in self.probes]))

    @property
    def largest_confidence_drift(self) -> float:
        """Confidence drift of the worst probe."""
        return float(np.max([probe.drift for probe in self.probes]))

    @property
    def decisions(self) -> int:
        """Number of probes with an exit decision."""
        return sum(probe.source_exits is not None for probe in self.probes)

    @property
    def flipped(self) -> tuple[ProbeResult, ...]:
        """Probes whose exit decision flipped."""
        return tuple(probe for probe in self.probes if probe.flipped)

    @property
    def flipped_exits(self) -> float | None:
        """Share of exit decisions that flipped; None: there are no decisions."""
        return len(self.flipped) / self.decisions if self.decisions else None

    @property
    def different_answers(self) -> int:
        """Number of flipped decisions where both models stop, with different answers."""
        return sum(probe.answers_differ for probe in self.probes)

    def failures(self, limits: VerificationLimits) -> tuple[str, ...]:
        """One line for each figure that is beyond its limit or not a number."""
        lines: list[str] = []
        for name, value, limit in (
            ("logits error", self.logits_error, limits.logits_error),
            ("KL", self.kl, limits.kl),
            ("confidence drift", self.confidence_drift, limits.confidence_drift),
            ("share of flipped exit decisions", self.flipped_exits, limits.flipped_exits),
        ):
            if limit is not None and value is not None and not value <= limit:
                lines.append(f"{name} is {value:.4g}, the limit is {limit:g}")
        if limits.top1 is not None and not self.top1 >= limits.top1:
            lines.append(f"top-1 agreement is {self.top1:.4g}, the limit is {limits.top1:g}")
        return tuple(lines)

    def verdict(self, limits: VerificationLimits) -> str:
        """One line: whether all figures are within their limits."""
        if not limits.limits_anything:
            return "no verdict: the recipe sets no limits"
        weights = "unquantized weights" if limits.bits == 16 else f"{limits.bits} bits"
        failures = self.failures(limits)
        return f"falls short: {'; '.join(failures)}" if failures else f"passed: within the limits of {weights}"

    def table(self, limits: VerificationLimits | None = None) -> str:
        """The figures in a few lines of text; if `limits` are passed, with the limits and the verdict."""
        bounds = {} if limits is None else {name: value for name, value in asdict(limits).items() if value is not None}

        def bound(name: str, form: str) -> str:
            return f", limit {bounds[name]:{form}}" if name in bounds else ""

        share = self.flipped_exits
        flips = "no decisions" if share is None else f"{len(self.flipped)} of {self.decisions} ({share:.1%})"
        if self.different_answers:
            flips += f", {self.different_answers} by another answer"
        rows = [
            (
                "logits error, relative",
                f"{self.logits_error:.4f}",
                f"largest {self.largest_logits_error:.4f}{bound('logits_error', 'g')}",
            ),
            ("top-1 agreement", f"{self.top1:.1%}", f"of {self.tokens} tokens{bound('top1', '.1%')}"),
            ("KL, nats per token", f"{self.kl:.5f}", bound("kl", "g").removeprefix(", ")),
            (
                "confidence drift",
                f"{self.confidence_drift:.4f}",
                f"largest {self.largest_confidence_drift:.4f}{bound('confidence_drift', 'g')}",
            ),
            ("exit decisions flipped", flips, f"threshold {self.threshold:g}{bound('flipped_exits', '.0%')}"),
        ]
        # VerificationLimits are for the means; "largest" shows the worst single token or probe.
        width = max(len(value) for _, value, _ in rows)
        lines = [f"{name:<24}{value:<{width}}  {note}".rstrip() for name, value, note in rows]
        for probe in self.flipped:
            ends = (
                f"{'exits' if exits else 'reasons'} ({answer or 'no answer'}, {confidence:.3f})"
                for exits, answer, confidence in (
                    (probe.source_exits, probe.source_answer, probe.source_confidence),
                    (probe.converted_exits, probe.converted_answer, probe.converted_confidence),
                )
            )
            lines.append(f"  {probe.name}: " + " -> ".join(ends))
        lines.append(
            f"{len(self.probes)} probes, source {self.source_run}, {self.seconds:.1f} s, "
            f"at most {self.peak_memory / 1e9:.2f} GB"
        )
        return "\n".join(lines if limits is None else [*lines, self.verdict(limits)])

    def to_dict(self, limits: VerificationLimits | None = None) -> dict[str, Any]:
        """Plain values for JSON, the table of probes included; None stands for what is not a number.

        `limits` adds "limits", "passed" (None: nothing is limited) and "shortfalls".
        """
        judged: dict[str, Any] = {}
        if limits is not None:
            failures = self.failures(limits)
            passed = not failures if limits.limits_anything else None
            judged = {"passed": passed, "shortfalls": list(failures), "limits": asdict(limits)}
        probes = []
        for probe in self.probes:
            values = asdict(probe)
            probes.append({**values, **values.pop("divergence"), "drift": probe.drift, "flipped": probe.flipped})
            probes[-1].pop("divergence")
        whole = {
            "source": self.source,
            "threshold": self.threshold,
            "logits_error": self.logits_error,
            "largest_logits_error": self.largest_logits_error,
            "top1": self.top1,
            "kl": self.kl,
            "confidence_drift": self.confidence_drift,
            "largest_confidence_drift": self.largest_confidence_drift,
            "flipped_exits": self.flipped_exits,
            "flipped": len(self.flipped),
            "different_answers": self.different_answers,
            "decisions": self.decisions,
            "tokens": self.tokens,
            "source_run": self.source_run,
            "seconds": round(self.seconds, 1),
            "peak_memory": self.peak_memory,
        }
        return {**_finite(whole), **judged, "probes": [_finite(probe) for probe in probes]}

    def _over_tokens(self, figure: Callable[[Divergence], float]) -> float:
        return sum(figure(probe.divergence) * probe.divergence.tokens for probe in self.probes) / self.tokens


def compare_logits(expected: mx.array, actual: mx.array) -> Divergence:
    """Compare float32 logits (tokens, vocab), row by row."""
    a, b = (logits - logits.mean(axis=-1, keepdims=True) for logits in (expected, actual))
    error = mx.linalg.norm(b - a, axis=-1) / mx.linalg.norm(a, axis=-1)
    log_p, log_q = (logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (a, b))
    kl = (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    same = mx.argmax(a, axis=-1) == mx.argmax(b, axis=-1)
    errors, divergences = np.array(error, dtype=np.float64), np.array(kl, dtype=np.float64)
    return Divergence(
        tokens=len(errors),
        logits_error=float(errors.mean()),
        largest_error=float(errors.max()),
        top1=float(np.array(same).mean()),
        kl=float(divergences.mean()),
    )


def _folded(answer: str | None) -> str:
    return " ".join((answer or "").casefold().split())


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
