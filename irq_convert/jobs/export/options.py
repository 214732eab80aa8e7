"""What an export is asked to do: one frozen object, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from irq_convert.jobs.common.options import MAX_SHARD_BYTES, check_sizes

TILE_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class ExportOptions:
    """Options of one export.

    `to` is the target's name. `dtype` is that of dense tensors and of stored scales, "auto" what
    the model has. `fallback` (None: the target's default) says how tensors are stored that the
    target cannot hold exactly, where it offers a choice. `refit` allows to change scales, zero
    points and codes where the target needs others. `threads` is for all computing, None for all
    cores; `tile_weights` bounds memory and never changes a byte. `trust_remote_code` runs code that
    comes with the tokenizer, which is refused else.
    """

    to: str
    dtype: str = "auto"
    fallback: str | None = None
    refit: bool = False
    threads: int | None = None
    overwrite: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    tile_weights: int = TILE_WEIGHTS
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_sizes(self.threads, self.max_shard_bytes, self.tile_weights)

    def to_dict(self) -> dict[str, object]:
        """What decides the bytes of the result."""
        names = ("to", "dtype", "fallback", "refit", "max_shard_bytes")
        return {name: getattr(self, name) for name in names}
