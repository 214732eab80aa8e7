"""What a conversion is asked to do: one frozen object, checked when it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import UsageError

MAX_SHARD_BYTES = 5_000_000_000
TILE_WEIGHTS = 1 << 22


def codebook_name(family: str, bits: int) -> str:
    """`("nf", 3)` to `"nf3"`; a full name such as `"int4"` has to agree with `bits`.

    Raises `UsageError` for bits other than 2, 3 or 4 and for an unknown family.
    """
    if bits not in (2, 3, 4):
        raise UsageError(f"--bits {bits}: weights are stored in 2, 3 or 4 bits")
    name = family if family in CODEBOOKS else f"{family}{bits}"
    if name not in CODEBOOKS:
        raise UsageError(f"--codebook {family}: choose nf (normal-float) or int (uniform levels)")
    if CODEBOOKS[name].bits != bits:
        raise UsageError(f"--codebook {family} has {CODEBOOKS[name].bits} bits, not {bits}")
    return name


@dataclass(frozen=True)
class ConvertOptions:
    """Options of one run.

    `keep` are regular expressions of tensors to copy, `bits_for` pairs of an expression and a
    number of bits, the last match winning; both are searched for in the tensor's name. `threads`
    is for the search, None for all cores. `tile_weights` bounds memory and never changes a byte.
    """

    spec: QuantSpec = field(default_factory=QuantSpec)
    keep: tuple[str, ...] = ()
    bits_for: tuple[tuple[str, int], ...] = ()
    device: str = "cpu"
    threads: int | None = None
    overwrite: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    tile_weights: int = TILE_WEIGHTS

    def __post_init__(self) -> None:
        for pattern in (*self.keep, *(pattern for pattern, _ in self.bits_for)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"{pattern!r} is not a regular expression: {error}") from None
        for _, bits in self.bits_for:
            codebook_name(self.spec.book.kind, bits)
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}: at least 1")

    def to_dict(self) -> dict[str, object]:
        """What decides the bytes of the artifact, for the manifest."""
        return {
            "codebook": self.spec.codebook,
            "block_size": self.spec.block_size,
            "objective": self.spec.objective,
            "refine": self.spec.refine,
            "keep": list(self.keep),
            "bits_for": [list(pair) for pair in self.bits_for],
            "max_shard_bytes": self.max_shard_bytes,
        }
