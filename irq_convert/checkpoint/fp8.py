"""FP8: weights in eight bits, each times the scale of its block, row, column or tensor.

A weight `X` lies beside `X_scale_inv` or `X_scale`, which in spite of its name is what to multiply
with. Which of the two and over what, their shapes tell, once config.json names the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from irq_convert.checkpoint.buffers import torch_dtype
from irq_convert.checkpoint.dense_rows import POWERS, DenseRows, chunk_rows, round_into
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.lazy import lazy_info
from irq_convert.errors import IrqError

if TYPE_CHECKING:
    from irq_convert.checkpoint.reader import TileReader

FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
KINDS = ("block", "channel", "tensor")
"""What a number of a scale counts for, the finest first; a channel is a row or a column."""
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""U8 are exponents, as in F8_E8M0."""
Block = tuple[int, int]
_Grid = tuple[int, int, int]


@dataclass(frozen=True)
class ScaledFp8(DenseRows):
    """`weight` `[..., rows, cols]` times `scale`, seen as `grid`: `[matrices or 1, rows, cols]`.

    A number of the grid counts for a `block` of numbers; the last blocks of a row or a column may
    be cut off.
    """

    weight: TensorInfo
    scale: TensorInfo
    grid: _Grid
    block: Block

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        return self.weight, self.scale

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        rows, cols = _at_least_a_matrix(self.weight.shape)[-2:]
        if self.grid[1:] == (1, 1):
            return "tensor"
        return "channel" if self.grid[1:] in ((rows, 1), (1, cols)) else "block"

    def with_sources(self, sources: tuple[TensorInfo, ...]) -> ScaledFp8:
        return replace(self, weight=sources[0], scale=sources[1])

    def width(self) -> int:
        return self.weight.shape[-1]

    def decode(self, reader: TileReader, info: TensorInfo, first: int, out: torch.Tensor) -> None:
        width = self.width()
        flat = replace(self.weight, shape=(self.weight.numel // max(1, width), width))
        step = chunk_rows(width)
        for at in range(0, out.shape[0], step):
            part = out[at : at + step]
            low = first + at
            tile = reader.read_rows(flat, low, low + part.shape[0])
            self._multiply(reader, info, tile, low, 0, part)

    def columns(
        self, reader: TileReader, info: TensorInfo, matrix: int, start: int, stop: int
    ) -> torch.Tensor:
        if info.shape[-2:] != self.weight.shape[-2:]:
            return super().columns(reader, info, matrix, start, stop)
        tile = reader.read_columns(self.weight, matrix, start, stop)
        out = torch.empty(tile.shape, dtype=torch_dtype(info.dtype))
        step = chunk_rows(stop - start)
        for at in range(0, len(tile), step):
            part = out[at : at + step]
            low = matrix * len(tile) + at
            self._multiply(reader, info, tile[at : at + step], low, start, part)
        return out

    def _multiply(
        self,
        reader: TileReader,
        info: TensorInfo,
        tile: torch.Tensor,
        row: int,
        column: int,
        out: torch.Tensor,
    ) -> None:
        """Fill `out` with the numbers of `tile`, whose first is at `row` and `column`."""
        if not tile.numel():
            return
        table = torch.arange(256, dtype=torch.uint8).view(tile.dtype).float()
        codes = tile.contiguous().view(torch.uint8).view(-1).int()
        values = torch.index_select(table, 0, codes).view(tile.shape)  # faster than `tile.float()`
        values.mul_(self._factors(reader, row, tile.shape[0], column, tile.shape[1]))
        round_into(out, values, info)

    def _factors(
        self, reader: TileReader, row: int, rows: int, column: int, columns: int
    ) -> torch.Tensor:
        """The scales of a tile, one for each number or for each row of it."""
        matrices, high, wide = self.grid
        size = math.prod(self.weight.shape[-2:-1])
        number = torch.arange(row, row + rows)
        at = number % size // self.block[0]
        if matrices > 1:
            at += number // size * high
        first, last = int(at.min()), int(at.max()) + 1
        flat = replace(self.scale, shape=(matrices * high, wide))
        found = _as_floats(reader.read_rows(flat, first, last))
        if wide == 1:
            return found[at - first]
        low, step = column // self.block[1], self.block[1]
        found = found[:, low : (column + columns - 1) // step + 1].repeat_interleave(step, 1)
        return found[:, column - low * step :][:, :columns][at - first]


def _as_floats(scale: torch.Tensor) -> torch.Tensor:
    if scale.dtype is torch.uint8:
        return torch.index_select(POWERS, 0, scale.view(-1).int()).view(scale.shape)
    return scale.float()


def decode_fp8(
    weight: TensorInfo, scale: TensorInfo, block: Block | None, dtype: str
) -> TensorInfo:
    """The dense tensor in `dtype` that a weight and its scale stand for.

    `block` is the size of the blocks that config.json tells, None where it tells none.
    Raises `IrqError` where the scale has another shape or dtype than such a weight can have.
    """
    found = _find_grid(weight.shape, scale.shape, block)
    if found is None or scale.dtype not in SCALE_DTYPES:
        raise IrqError(
            f"{scale.shard}: {scale.name} is {scale.dtype} {list(scale.shape)}, which does not fit "
            f"{weight.name} {list(weight.shape)} in {weight.shard.name}: it needs "
            f"{_wanted(weight.shape, block)}; get config.json and all files of one release"
        )
    return lazy_info(weight.name, dtype, weight.shape, ScaledFp8(weight, scale, *found))


def _find_grid(
    shape: tuple[int, ...], scale: tuple[int, ...], block: Block | None
) -> tuple[_Grid, Block] | None:
    """What a scale of shape `scale` counts for, or None where it does not fit."""
    *lead, rows, cols = _at_least_a_matrix(shape)
    if math.prod(scale) == 1:
        return (1, 1, 1), (max(1, rows), max(1, cols))
    if scale == (rows,) and len(shape) == 2:
        scale = (rows, 1)
    if len(scale) != len(shape) or len(shape) < 2 or list(scale[:-2]) != lead or 0 in scale:
        return None
    high, wide = scale[-2:]
    grid = math.prod(lead), high, wide
    if block and (high, wide) == _blocks(rows, cols, block):
        return grid, block
    if high in (1, rows) and wide in (1, cols):
        return grid, (rows // high, cols // wide)
    across = _blocks(rows, cols, block)[1] if block else 1
    if lead and (high, wide) == (2, across) and rows % 2 == 0 and (not block or rows <= block[0]):
        return grid, (rows // 2, block[1] if block else cols)  # gate and up share no block
    return None


def _at_least_a_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (2 - len(shape)) + shape


def _blocks(rows: int, cols: int, block: Block) -> Block:
    return -(-rows // block[0]), -(-cols // block[1])


def _wanted(shape: tuple[int, ...], block: Block | None) -> str:
    each = "one number"
    if len(shape) > 1:
        *lead, rows, cols = shape
        each += f" or {[*lead, rows, 1]}"
        if block:
            blocks = [*lead, *_blocks(rows, cols, block)]
            each = f"{blocks} for blocks of {list(block)}, {each}"
    return f"{each}, in one of {', '.join(SCALE_DTYPES)}"
