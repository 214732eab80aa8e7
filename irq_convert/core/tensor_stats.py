"""What quantization did to a tensor: entropy before and after, squared error. Exact to add up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from irq_convert.core.blocks import BlockShape
from irq_convert.core.search_plan import entropy_shift, entropy_table

TILE = 1 << 20
"""Codes that are counted at once."""


@dataclass(frozen=True)
class TensorStats:
    """Sums over the blocks of one tensor or tile.

    `plain` and `stored` are sums of the integer entropy table, uncalibrated and as stored;
    `energies` is float64 `[groups, 2]`, sums of squares of the weights and of the errors. Sums stay
    integers, or per group, until they are read, so the cut into tiles never shows.
    """

    shape: BlockShape
    plain: int
    stored: int
    energies: np.ndarray

    def __add__(self, below: TensorStats) -> TensorStats:
        """Statistics of two tiles of the same tensor, `below` following this one."""
        rows = self.shape.rows + below.shape.rows
        return TensorStats(
            self.shape.tile(rows),
            self.plain + below.plain,
            self.stored + below.stored,
            np.concatenate([self.energies, below.energies]),
        )

    @property
    def weights(self) -> int:
        return self.shape.rows * self.shape.cols

    def _entropy(self, table_sum: int) -> float:
        s = self.shape
        whole = (s.blocks_per_row - 1) * s.block_size * math.log2(s.block_size)
        lengths = s.rows * (whole + s.tail * math.log2(s.tail))
        # The table is rounded, so blocks of one code could come out a hair below zero.
        return max(0.0, (lengths - table_sum / 2 ** entropy_shift(s.block_size)) / self.weights)

    @property
    def entropy_plain(self) -> float:
        """Mean entropy of a code, bits, for the same codebook uncalibrated."""
        return self._entropy(self.plain)

    @property
    def entropy(self) -> float:
        """Mean entropy of a code as stored, bits: `-sum p log2 p` of each block, by length."""
        return self._entropy(self.stored)

    @property
    def energy(self) -> float:
        """Sum of squares of the weights."""
        return math.fsum(self.energies[:, 0])

    @property
    def squared_error(self) -> float:
        """Sum of squared differences between the weights and what is stored."""
        return math.fsum(self.energies[:, 1])

    @property
    def relative_error(self) -> float:
        """`squared_error / energy`, 0 for a tensor of zeros."""
        return self.squared_error / self.energy if self.energy else 0.0


def entropy_sum(codes: np.ndarray, shape: BlockShape) -> int:
    """The sum of the integer entropy table over the blocks of `codes`, uint8 `[rows, cols]`.

    `shape` may have more rows. What `TensorStats.stored` is, counted again.
    """
    table, levels = entropy_table(shape.block_size), 1 << shape.bits
    block = np.arange(shape.cols) // shape.block_size
    step, total = max(1, TILE // shape.cols), 0
    for start in range(0, len(codes), step):
        rows = codes[start : start + step]
        keys = (np.arange(len(rows))[:, None] * shape.blocks_per_row + block) * levels
        keys += rows
        counts = np.bincount(keys.reshape(-1), minlength=len(rows) * shape.blocks_per_row * levels)
        total += int(table[counts].sum(dtype=np.int64))
    return total


def encode_stats(stats: TensorStats) -> dict[str, Any]:
    """`stats` as JSON, its energies summed up: all that is ever read of them."""
    shape = stats.shape
    return {
        "shape": [shape.rows, shape.cols, shape.block_size, shape.bits],
        "plain": int(stats.plain),
        "stored": int(stats.stored),
        "energies": [stats.energy, stats.squared_error],
    }


def decode_stats(found: Mapping[str, Any]) -> TensorStats:
    """The statistics that `encode_stats` was given: the same in every figure, to the last bit."""
    energies = np.array([found["energies"]], dtype=np.float64)
    return TensorStats(BlockShape(*found["shape"]), found["plain"], found["stored"], energies)
