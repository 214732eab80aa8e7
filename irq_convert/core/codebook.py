"""The six codebooks under one formula: `w = level[code] * scale + tau`.

Normal-float levels are those of QLoRA (nf4) and of IR-QLoRA's code (nf2, nf3); integer levels are
`2**bits` uniform steps from -1 to 1, which with tau is asymmetric integer quantization with a
float zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from irq_convert.errors import UsageError

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


@dataclass(frozen=True)
class Codebook:
    """A named, strictly increasing set of `2**bits` levels from -1 to 1.

    `levels` are exact in float32; `kind` is "nf" or "int" and decides the path that is searched.
    """

    name: str
    bits: int
    kind: str
    levels: tuple[float, ...]

    def level_array(self) -> np.ndarray:
        """Levels as float32 `[2**bits]`."""
        return np.array(self.levels, dtype=np.float32)

    def midpoint_array(self) -> np.ndarray:
        """Midpoints between neighbouring levels, float32 `[2**bits - 1]`, rounded once."""
        wide = np.array(self.levels, dtype=np.float32).astype(np.float64)
        return ((wide[1:] + wide[:-1]) / 2).astype(np.float32)


def _uniform(bits: int) -> tuple[float, ...]:
    last = 2**bits - 1
    return tuple(float(np.float32((2 * k - last) / last)) for k in range(last + 1))


CODEBOOKS: dict[str, Codebook] = {
    "nf2": Codebook("nf2", 2, "nf", _NF2),
    "nf3": Codebook("nf3", 3, "nf", _NF3),
    "nf4": Codebook("nf4", 4, "nf", _NF4),
    "int2": Codebook("int2", 2, "int", _uniform(2)),
    "int3": Codebook("int3", 3, "int", _uniform(3)),
    "int4": Codebook("int4", 4, "int", _uniform(4)),
}


def get_codebook(name: str) -> Codebook:
    """The codebook called `name`; `UsageError` lists the known ones otherwise."""
    try:
        return CODEBOOKS[name]
    except KeyError:
        known = ", ".join(CODEBOOKS)
        raise UsageError(f"unknown codebook {name!r}: choose one of {known}") from None
