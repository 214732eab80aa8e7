"""What a conversion is asked to do: one frozen object, checked when it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import UsageError
from irq_convert.jobs.resume import Resume

MAX_SHARD_BYTES = 5_000_000_000
TILE_WEIGHTS = 1 << 21


def codebook_name(family: str, bits: int, option: str = "--bits") -> str:
    """`("nf", 3)` to `"nf3"`; a full name such as `"int4"` has to agree with `bits`.

    Raises `UsageError` for bits other than 2, 3 or 4, naming the `option` that gave them, and for
    an unknown family.
    """
    if bits not in (2, 3, 4):
        raise UsageError(f"{option} {bits}: weights are stored in 2, 3 or 4 bits")
    name = family if family in CODEBOOKS else f"{family}{bits}"
    if name not in CODEBOOKS:
        raise UsageError(f"--codebook {family}: choose nf (normal-float) or int (uniform levels)")
    if CODEBOOKS[name].bits != bits:
        own = CODEBOOKS[name].bits
        raise UsageError(f"--codebook {family} has {own} bits, not {bits}: add --bits {own}")
    return name


@dataclass(frozen=True)
class ConvertOptions:
    """Options of one run.

    `keep` are regular expressions of tensors to copy, `bits_for` pairs of an expression and a
    number of bits, the last match winning; both are searched for in the tensor's name. `threads`
    is for the search, None for all cores. `tile_weights` bounds memory and never changes a byte,
    `stream` the room that a Hub model takes: its files are deleted when they were read.
    `include_towers` quantizes the linear layers of vision and audio towers, too. `resume` says
    whether shards that an earlier run has left are used.
    """

    spec: QuantSpec = field(default_factory=QuantSpec)
    keep: tuple[str, ...] = ()
    bits_for: tuple[tuple[str, int], ...] = ()
    include_towers: bool = False
    device: str = "cpu"
    threads: int | None = None
    overwrite: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    tile_weights: int = TILE_WEIGHTS
    stream: bool = False
    resume: Resume = Resume.AUTO

    def __post_init__(self) -> None:
        for pattern in self.keep:
            _check_expression("--keep", pattern)
        for pattern, bits in self.bits_for:
            _check_expression("--bits-for", pattern)
            codebook_name(self.spec.book.kind, bits, f"--bits-for {pattern!r} =")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}: at least 1")
        if self.max_shard_bytes < 1:
            raise UsageError(f"a shard of {self.max_shard_bytes} bytes holds nothing: at least 1")
        if self.tile_weights < 1:
            raise UsageError(f"tiles of {self.tile_weights} weights: at least 1")

    def to_dict(self) -> dict[str, object]:
        """What decides the bytes of the artifact, for the manifest."""
        return {
            "codebook": self.spec.codebook,
            "block_size": self.spec.block_size,
            "objective": self.spec.objective,
            "refine": self.spec.refine,
            "zero_point": self.spec.zero_point,
            "keep": list(self.keep),
            "bits_for": [list(pair) for pair in self.bits_for],
            "include_towers": self.include_towers,
            "max_shard_bytes": self.max_shard_bytes,
        }


def _check_expression(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{option} {pattern!r} is not a regular expression: {error}") from None
