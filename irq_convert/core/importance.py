"""How much the columns of a matrix count: importance as small integers, block by block.

The error of column j of `y = W x` reaches the output times the mean square of its input, so the
search weighs squared errors by it. Sums have to stay exact for every implementation to give the
same bytes; importance is therefore rounded to integers from 1 to `MOST_SHARE`, in proportion to the
largest of its block, since blocks are searched one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from irq_convert.errors import IrqError, UsageError

SHARE_BITS = 8
MOST_SHARE = 2**SHARE_BITS - 1


@dataclass(frozen=True)
class Shares:
    """`values`, int32 `[matrices, cols]`: what an error of each column counts for in its block.

    `rows` of each matrix lie one below the other.
    """

    values: np.ndarray
    rows: int

    def owners(self, start: int, stop: int) -> np.ndarray:
        """Which matrix each of the rows from `start` to `stop` belongs to, int32."""
        return (np.arange(start, stop) // self.rows).astype(np.int32)


def column_shares(importance: np.ndarray, rows: int, block_size: int, name: str) -> Shares:
    """Importance `[cols]` or `[matrices, cols]`, float, as shares of matrices of `rows` rows.

    A column without any importance keeps the least share, so that its codes stay near its weights.
    Raises `IrqError` naming the tensor for NaN, infinite or negative importance, and `UsageError`
    for a shape that is none of these two.
    """
    wide = np.atleast_2d(np.asarray(importance, np.float64))
    if wide.ndim != 2 or not wide.size:
        raise UsageError(f"{name}: importance has shape {list(np.shape(importance))}: give [cols]")
    if not np.isfinite(wide).all() or (wide < 0).any():
        raise IrqError(f"{name}: its importance has NaN, infinite or negative numbers")
    matrices, cols = wide.shape
    padding = -cols % block_size
    blocks = np.pad(wide, ((0, 0), (0, padding))).reshape(matrices, -1, block_size)
    most = blocks.max(axis=2, keepdims=True)
    # Scaled by a power of two first: of two denormal numbers the quotient has few digits.
    exponent = -np.frexp(most)[1]
    part = np.ldexp(blocks, exponent) / np.where(most > 0, np.ldexp(most, exponent), 1.0)
    whole = np.maximum(1, np.rint(part * MOST_SHARE)).astype(np.int32)
    return Shares(np.ascontiguousarray(whole.reshape(matrices, -1)[:, :cols]), rows)
