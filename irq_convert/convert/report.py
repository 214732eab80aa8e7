"""What a finished conversion has to say."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class WorstTensor:
    """A tensor among those with the largest relative error."""

    name: str
    codebook: str
    relative_error: float


@dataclass(frozen=True)
class ConvertReport:
    """Sizes in bytes, entropies in bits a code, `seconds` for the whole run.

    `bytes_in` counts tensors and the files beside them, `bytes_out` the whole folder.

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

    @property
    def share(self) -> float:
        """Part of the source's numbers that were quantized."""
        return self.quantized_weights / self.weights

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return {**asdict(self), "share": self.share}
