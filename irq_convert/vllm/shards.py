"""What one rank of tensor parallelism holds of a stored matrix: rows, and whole blocks of them.

Eight-bit statistics keep their grids where a rank's part begins with a group and is whole in its
columns; elsewhere groups would be cut, and the part holds the float32 numbers that they stand for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from irq_convert.core.quantized import QuantizedTensor
from irq_convert.errors import UsageError
from irq_convert.nn.parts import cut_columns, cut_rows, without_grids


@dataclass(frozen=True)
class Shard:
    """Spans `begin .. end` of rows, in their order, and of columns, None where those are whole."""

    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None = None

    @property
    def height(self) -> int:
        """How many rows."""
        return sum(end - begin for begin, end in self.rows)

    def width(self, cols: int) -> int:
        """How many of `cols` columns."""
        return cols if self.columns is None else self.columns[1] - self.columns[0]


def joined(rows: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The same rows in as few spans as can be."""
    found: list[tuple[int, int]] = []
    for begin, end in rows:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        elif begin < end:
            found.append((begin, end))
    return tuple(found)


def check_columns(name: str, shard: Shard, cols: int, block_size: int) -> None:
    """Raise `UsageError` where the columns of `shard` do not lie on the borders of blocks."""
    if shard.columns is None:
        return
    begin, end = shard.columns
    if begin % block_size or (end % block_size and end != cols):
        raise UsageError(
            f"{name}: {cols} columns in blocks of {block_size} cannot be split at column "
            f"{begin if begin % block_size else end}: choose another --tensor-parallel-size, or "
            "convert with smaller blocks"
        )


def cut(name: str, q: QuantizedTensor, shard: Shard) -> QuantizedTensor:
    """The part of `q` that `shard` says, on the device of `q`; `name` is for people.

    Decodes to exactly those rows and columns of the dense matrix. Raises `UsageError` where columns
    do not lie on the borders of blocks.
    """
    check_columns(name, shard, q.cols, q.block_size)
    rows = joined(shard.rows) or ((0, 0),)
    if shard.columns is None or shard.columns == (0, q.cols):
        parts = [cut_rows(q, begin, end) for begin, end in rows]
        return _stacked(parts)
    first, last = shard.columns[0] // q.block_size, -(-shard.columns[1] // q.block_size)
    parts = [
        cut_columns(without_grids(cut_rows(q, begin, end)), first, last) for begin, end in rows
    ]
    return _stacked(parts)


def _stacked(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """`parts`, at least one, one below the other."""
    if len(parts) == 1:
        return parts[0]
    wide = [without_grids(part) for part in parts]
    codes, scale, tau = (
        torch.cat([getattr(part, what) for part in wide]) for what in ("codes", "scale", "tau")
    )
    return replace(wide[0], codes=codes, scale=scale, tau=tau)
