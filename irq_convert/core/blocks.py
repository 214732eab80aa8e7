"""Geometry of a quantized matrix: blocks along a row, groups of blocks, bytes of a packed row.

A matrix `[rows, cols]` is cut into blocks of `block_size` consecutive weights of one row; the last
block of a row may be short. Blocks are numbered row by row, and every `GROUP_SIZE` consecutive
ones share a second-level grid for their scales and one for their taus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GROUP_SIZE = 256


@dataclass(frozen=True)
class BlockShape:
    """Sizes that follow from `(rows, cols, block_size, bits)`, in elements or bytes."""

    rows: int
    cols: int
    block_size: int
    bits: int

    @property
    def blocks_per_row(self) -> int:
        return -(-self.cols // self.block_size)

    @property
    def blocks(self) -> int:
        return self.rows * self.blocks_per_row

    @property
    def groups(self) -> int:
        return -(-self.blocks // GROUP_SIZE)

    @property
    def row_bytes(self) -> int:
        return -(-self.cols * self.bits // 8)

    @property
    def tail(self) -> int:
        """Length of the last block of each row, 1 to `block_size`."""
        return self.cols - (self.blocks_per_row - 1) * self.block_size

    @property
    def row_multiple(self) -> int:
        """Rows of a tile must be a multiple of this so that no group straddles two tiles."""
        return GROUP_SIZE // math.gcd(GROUP_SIZE, self.blocks_per_row)

    def tile_rows(self, tile_weights: int) -> int:
        """Rows of a tile of about `tile_weights` weights, a multiple of `row_multiple`."""
        step = self.row_multiple
        return max(1, tile_weights // max(1, self.cols * step)) * step

    def tile(self, rows: int) -> BlockShape:
        """The same matrix cut down to `rows` rows."""
        return BlockShape(rows, self.cols, self.block_size, self.bits)
