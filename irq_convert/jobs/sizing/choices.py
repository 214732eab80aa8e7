"""What a matrix can become: a codebook and a block size, or nothing at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from irq_convert.core.codebook import FAMILIES, WIDTHS, get_codebook
from irq_convert.core.spec import QuantSpec

BLOCKS = (32, 64, 128, 256)
DENSE_BITS = 16
"""What a weight that is left as it is counts as in a rule, whatever its dtype."""


@dataclass(frozen=True)
class Choice:
    """`codebook` in blocks of `block_size`; both None for a weight that is left as it is."""

    codebook: str | None = None
    block_size: int | None = None

    @property
    def bits(self) -> int:
        """Of a code."""
        return DENSE_BITS if self.codebook is None else get_codebook(self.codebook).bits

    def spec(self, base: QuantSpec) -> QuantSpec | None:
        """How a weight is quantized, the rest as in `base`; None for one that is not."""
        if self.codebook is None or self.block_size is None:
            return None
        return replace(base, codebook=self.codebook, block_size=self.block_size)

    def __str__(self) -> str:
        return "dense" if self.codebook is None else f"{self.codebook}/{self.block_size}"

    @classmethod
    def parse(cls, text: str) -> Choice:
        """The inverse of `str`; `ValueError` for anything else."""
        if text == "dense":
            return DENSE
        codebook, _, size = text.partition("/")
        found = cls(codebook, int(size))
        if str(found) != text or codebook not in _NAMES:
            raise ValueError(text)
        return found


DENSE = Choice()
_NAMES = {f"{family}{bits}" for family in FAMILIES for bits in WIDTHS}


def quantized_choices(
    families: Sequence[str] = tuple(FAMILIES), blocks: Sequence[int] = BLOCKS
) -> tuple[Choice, ...]:
    """Every codebook of `families` at every one of `blocks`, in an order that never changes."""
    return tuple(
        Choice(f"{family}{bits}", block)
        for family in families
        for bits in WIDTHS
        for block in sorted(blocks)
    )
