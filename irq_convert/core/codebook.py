"""The codebooks under one formula, `w = level[code] * scale + tau`: the one place that lists them.

Normal-float levels are those of QLoRA (nf4) and of IR-QLoRA's code (nf2, nf3); integer levels are
`2**bits` uniform steps from -1 to 1, which with tau is asymmetric integer quantization with a
float zero point. A codebook of a known family and width is a row of `CODEBOOKS` and nothing else;
numpy is imported only for arrays, so that help may read the names.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from irq_convert.core.objective import Objective
from irq_convert.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

LEAST_BITS, MOST_BITS = 2, 4
"""Widths of a code that kernels serve; all but four kernels follow from these two numbers.

More is work in `kernels/lookup.py` and `dequantize.py`, where one register holds the 16 levels, and
in `triton/emit.py` and `dequantize.py`, where one int32 holds eight codes.
"""
MOST_LEVELS = 1 << MOST_BITS


@dataclass(frozen=True)
class Family:
    """What the codebooks of one kind share, and what it means for the search.

    `uniform` levels are equally far apart: calibration starts at the middle of a block's range and
    moves both ends of it, and integer zero points exist. Others start at the median and move tau,
    with the scale that then reaches the farther end. `objective` is what "auto" becomes: measured
    in docs/benchmarks.md, "Integer paths".
    """

    name: str
    meaning: str
    uniform: bool
    objective: Objective


FAMILIES: dict[str, Family] = {
    each.name: each
    for each in (
        Family("nf", "normal-float", uniform=False, objective=Objective.ENTROPY),
        Family("int", "uniform levels", uniform=True, objective=Objective.MSE),
    )
}

_NF2 = (-1.0, -0.25256848335266113, 0.2525685131549835, 1.0)
_NF3 = (
    -1.0,
    -0.4786292016506195,
    -0.217141792178154,
    0.0,
    0.16093020141124725,
    0.33791524171829224,
    0.5626170039176941,
    1.0,
)
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _float32(value: float) -> float:
    """`value` rounded to binary32."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _uniform(bits: int) -> tuple[float, ...]:
    last = 2**bits - 1
    return tuple(_float32((2 * k - last) / last) for k in range(last + 1))


@dataclass(frozen=True)
class Codebook:
    """A named, strictly increasing set of `2**bits` levels from -1 to 1.

    `levels` are rounded to float32; `kind` is the name of its family. Raises `UsageError` for other
    levels, and for more of them than kernels can look up.
    """

    name: str
    bits: int
    kind: str
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if not LEAST_BITS <= self.bits <= MOST_BITS:
            raise UsageError(
                f"codebook {self.name} has {self.bits}-bit codes: kernels look up "
                f"{LEAST_BITS} to {MOST_BITS} bits (irq_convert/core/kernels/lookup.py)"
            )
        if self.kind not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise UsageError(f"codebook {self.name}: no family {self.kind!r}, only {known}")
        object.__setattr__(self, "levels", tuple(map(_float32, self.levels)))
        ends = self.levels[:1] + self.levels[-1:]
        rising = all(low < high for low, high in pairwise(self.levels))
        if len(self.levels) != 2**self.bits or ends != (-1.0, 1.0) or not rising:
            raise UsageError(
                f"codebook {self.name} needs {2**self.bits} levels that rise from -1 to 1"
            )
        if self.uniform and self.levels != _uniform(self.bits):
            raise UsageError(f"codebook {self.name} of family {self.kind} needs uniform levels")

    @property
    def family(self) -> Family:
        return FAMILIES[self.kind]

    @property
    def uniform(self) -> bool:
        """Whether its levels are equally far apart."""
        return self.family.uniform

    def level_array(self) -> np.ndarray:
        """Levels as float32 `[2**bits]`."""
        import numpy as np

        return np.array(self.levels, dtype=np.float32)

    def midpoint_array(self) -> np.ndarray:
        """Midpoints between neighbouring levels, float32 `[2**bits - 1]`, rounded once."""
        import numpy as np

        wide = self.level_array().astype(np.float64)
        return ((wide[1:] + wide[:-1]) / 2).astype(np.float32)


CODEBOOKS: dict[str, Codebook] = {
    each.name: each
    for each in (
        Codebook("nf2", 2, "nf", _NF2),
        Codebook("nf3", 3, "nf", _NF3),
        Codebook("nf4", 4, "nf", _NF4),
        Codebook("int2", 2, "int", _uniform(2)),
        Codebook("int3", 3, "int", _uniform(3)),
        Codebook("int4", 4, "int", _uniform(4)),
    )
}
WIDTHS = tuple(sorted({book.bits for book in CODEBOOKS.values()}))
"""Bits of a code that some codebook has."""


def in_words(words: Iterable[object]) -> str:
    """`(2, 3, 4)` to "2, 3 or 4"."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


WIDTHS_IN_WORDS = in_words(WIDTHS)
FAMILIES_IN_WORDS = in_words(f"{each.name} ({each.meaning})" for each in FAMILIES.values())


def get_codebook(name: str) -> Codebook:
    """The codebook called `name`; `UsageError` lists the known ones otherwise."""
    try:
        return CODEBOOKS[name]
    except KeyError:
        known = ", ".join(CODEBOOKS)
        raise UsageError(f"unknown codebook {name!r}: choose one of {known}") from None
