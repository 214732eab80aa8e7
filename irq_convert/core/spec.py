"""How a tensor is quantized: the options a user chooses, checked, and the search they mean."""

from __future__ import annotations

from dataclasses import dataclass

from irq_convert.core.codebook import Codebook, get_codebook
from irq_convert.core.objective import Objective, ZeroPoint
from irq_convert.core.statistic_dtypes import FLOAT32, UINT8
from irq_convert.errors import UsageError

OBJECTIVES = (Objective.NONE.value, *(each.value for each in Objective if each != Objective.NONE))
ZERO_POINTS = tuple(each.value for each in ZeroPoint)
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024)
MAX_REFINE = 1000


@dataclass(frozen=True)
class QuantSpec:
    """Options of one quantized tensor.

    `codebook`: nf2, nf3, nf4, int2, int3 or int4. `block_size`: weights that share a scale and a
    tau. `objective`: an `Objective`, "entropy" (ICQ), "mse" (tau and scale by squared error) or
    "none" (plain, uncalibrated), or "auto", which becomes what is best for the codebook. `refine`:
    most rounds of alternating least squares after the search. `zero_point`: "integer" (codebooks
    int2, int3, int4 only) lets tau be minus a level times the scale and nothing else, as other
    engines' integer formats do; tau is then stored in float32. Members of `Objective` and
    `ZeroPoint` are kept as plain strings.
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
            object.__setattr__(self, "objective", self.book.family.objective)
        if self.objective not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise UsageError(f"unknown objective {self.objective!r}: choose one of {known}")
        object.__setattr__(self, "objective", str(self.objective))
        if not 0 <= self.refine <= MAX_REFINE:
            raise UsageError(f"refine must be from 0 to {MAX_REFINE} rounds, not {self.refine}")
        if self.zero_point not in ZERO_POINTS:
            known = ", ".join(ZERO_POINTS)
            raise UsageError(f"unknown zero point {self.zero_point!r}: choose one of {known}")
        object.__setattr__(self, "zero_point", str(self.zero_point))
        if self.zero_point == ZeroPoint.INTEGER and not self.book.uniform:
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
        return (FLOAT32 if self.zero_point == ZeroPoint.INTEGER else UINT8).name

    @property
    def bits(self) -> int:
        return self.book.bits
