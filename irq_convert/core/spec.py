"""How a tensor is quantized: the options a user chooses, checked, and the search they mean."""

from __future__ import annotations

from dataclasses import dataclass

from irq_convert.core.codebook import Codebook, get_codebook
from irq_convert.errors import UsageError

OBJECTIVES = ("none", "entropy", "mse")
BEST_OBJECTIVE = {"nf": "entropy", "int": "mse"}
"""What "auto" means by kind of codebook: measured in docs/benchmarks.md, "Integer paths"."""
ZERO_POINTS = ("float", "integer")
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024)
MAX_REFINE = 1000


@dataclass(frozen=True)
class QuantSpec:
    """Options of one quantized tensor.

    `codebook`: nf2, nf3, nf4, int2, int3 or int4. `block_size`: weights that share a scale and a
    tau. `objective`: "entropy" (ICQ), "mse" (tau and scale by squared error), "none" (plain,
    uncalibrated) or "auto", which becomes what is best for the codebook. `refine`: most rounds of
    alternating least squares after the search. `zero_point`: "integer" (codebooks int2, int3, int4
    only) lets tau be minus a level times the scale and nothing else, as other engines' integer
    formats do; tau is then stored in float32.
    Raises `UsageError` for anything else.
    """

    codebook: str = "nf4"
    block_size: int = 64
    objective: str = "auto"
    refine: int = 0
    zero_point: str = "float"

    def __post_init__(self) -> None:
        get_codebook(self.codebook)
        if self.block_size not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            raise UsageError(f"unsupported block size {self.block_size}: choose one of {known}")
        if self.objective == "auto":
            object.__setattr__(self, "objective", BEST_OBJECTIVE[self.book.kind])
        if self.objective not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise UsageError(f"unknown objective {self.objective!r}: choose one of {known}")
        if not 0 <= self.refine <= MAX_REFINE:
            raise UsageError(f"refine must be from 0 to {MAX_REFINE} rounds, not {self.refine}")
        if self.zero_point not in ZERO_POINTS:
            known = ", ".join(ZERO_POINTS)
            raise UsageError(f"unknown zero point {self.zero_point!r}: choose one of {known}")
        if self.zero_point == "integer" and self.book.kind != "int":
            raise UsageError(
                f"integer zero points are for uniform levels, not {self.codebook}: use the "
                "codebook int, or float zero points"
            )

    @property
    def book(self) -> Codebook:
        return get_codebook(self.codebook)

    @property
    def tau_dtype(self) -> str:
        """How tau is stored: 8 bits of its own, or the exact product of a level and the scale."""
        return "float32" if self.zero_point == "integer" else "uint8"

    @property
    def bits(self) -> int:
        return self.book.bits
