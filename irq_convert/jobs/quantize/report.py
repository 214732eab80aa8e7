"""What a finished conversion has to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from irq_convert.checkpoint.source import PLAIN


@dataclass(frozen=True)
class WorstTensor:
    """A tensor among those with the largest relative error."""

    name: str
    codebook: str
    relative_error: float


@dataclass(frozen=True)
class QuantizeReport:
    """Sizes in bytes, entropies in bits a code, `seconds` for the whole run.

    `bytes_in` counts the files of the weights and those beside them, `bytes_out` the whole folder.
    `source_format` says how the weights were stored, as `inspect` does.

    `kept` counts the numbers that were copied, by the reason.
    `relative_error` is the sum of squared errors over the sum of squares of the quantized weights.
    """

    out: str
    decided_by: str
    bytes_in: int
    bytes_out: int
    weights: int
    quantized_weights: int
    bits_per_weight: float
    entropy_plain: float
    entropy: float
    relative_error: float
    worst: tuple[WorstTensor, ...]
    seconds: float
    kept: Mapping[str, int] = field(default_factory=dict)
    source_format: str = PLAIN
    calibration: Mapping[str, Any] | None = None
    importance: Mapping[str, Any] | None = None
    target: Mapping[str, Any] | None = None

    @property
    def share(self) -> float:
        """Part of the source's numbers that were quantized."""
        return self.quantized_weights / self.weights

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return {**asdict(self), "share": self.share}


LITTLE = 0.5
"""Quantizing less than this part of a model is worth a word."""


def little_quantized(weights: int, quantized_weights: int, kept: Mapping[str, int]) -> str | None:
    """One line that says why less than half of a model is quantized; None where it is more.

    `kept` counts weights by the reason for which they stay dense (`QuantizePlan.kept`).
    """
    if quantized_weights >= LITTLE * weights:
        return None
    reasons = [f"{why}: {count / weights:.0%}" for why, count in kept.items() if count]
    return (
        f"only {quantized_weights / weights:.0%} of the weights are quantized; kept as they are: "
        + "; ".join(reasons)
    )
