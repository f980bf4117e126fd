"""The result of a conversion, as numbers and as the table that the command line prints."""

import dataclasses
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxvr.checkpoint.recipe import VerificationLimits
    from mlxvr.conversion.measure.verify import VerificationReport

__all__ = ["ConversionReport", "format_bytes", "peak_memory"]


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """The result of a conversion.

    `bits` is the recipe's or the caller's value (0: unquantized, "auto": chosen for each module); `bytes_before` and
    `bytes_after` count tensors; `indivisible` are modules that the recipe quantizes but whose rows cannot be divided
    into groups; an interrupted run had already written `resumed_shards` of the `shards`; `peak_memory` is the process's
    largest resident size in bytes, the verification not included; `verification` and its `limits` are None unless a
    verification was asked for.
    """

    path: Path
    source: str
    commit: str
    recipe: str
    bits: int | str
    group_size: int
    mode: str
    dtype: str
    threshold: float
    parameters: int
    quantized: int
    indivisible: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    shards: int
    resumed_shards: int
    seconds: float
    peak_memory: int
    verification: "VerificationReport | None" = None
    limits: "VerificationLimits | None" = None
    shortfalls: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each number of the network, scales and unquantized tensors included."""
        return 8 * self.bytes_after / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and `bits_per_weight`, as JSON-ready values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["limits"]  # the verification includes them
        values |= {"path": str(self.path), "bits_per_weight": self.bits_per_weight}
        return {**values, "verification": self.verification and self.verification.to_dict(self.limits)}

    def table(self) -> str:
        """Return the figures as a table to read, followed by the verification's."""
        resumed = f", {self.resumed_shards} of them from before" if self.resumed_shards else ""
        rows = [
            ("source", self.source + (f" at {self.commit[:12]}" if self.commit else "")),
            ("recipe", f"{self.recipe}, threshold {self.threshold}"),
            ("weights", f"{self._weights()}, the rest {self.dtype}"),
            ("matrices", f"{self.quantized} quantized{self._indivisible()}"),
            ("size", f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"),
            ("bits per weight", f"{self.bits_per_weight:.2f}, unquantized tensors and scales included"),
            ("shards", f"{self.shards}{resumed}"),
            ("time", f"{self.seconds:.1f} s"),
            ("peak memory", f"{format_bytes(self.peak_memory)} while converting"),
            ("written to", str(self.path)),
        ]
        table = "\n".join(f"{name:16} {value}" for name, value in rows)
        if self.verification is None:
            return table
        note = " (kept because of --force)" if self.shortfalls else ""
        return f"{table}\n\n{self.verification.table(self.limits)}{note}"

    def _weights(self) -> str:
        if self.bits == 0:
            return "not quantized"
        if self.bits == "auto":
            return "bits chosen for each module"
        mode = "" if self.mode == "affine" else f" ({self.mode})"
        return f"{self.bits} bits{mode}, groups of {self.group_size}"

    def _indivisible(self) -> str:
        count = len(self.indivisible)
        return f", {count} kept because groups of {self.group_size} do not divide their rows" if count else ""


def format_bytes(count: int) -> str:
    """Return a size to read, in decimal units."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def peak_memory() -> int:
    """Return the most memory that the process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
