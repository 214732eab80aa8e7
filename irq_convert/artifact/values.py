"""The numbers of one quantized tensor, tile by tile: are they legal, and what did they lose.

Everything is recomputed in float64 from the stored parts through the public dequantization, so a
figure that agrees with the manifest was reached in two ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from irq_convert.artifact.contents import read_part, read_quantized
from irq_convert.artifact.structure import WAY_OUT, StoredTensor
from irq_convert.checkpoint.columns import row_tiles
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.core.blocks import GROUP_SIZE, BlockShape
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.packing import unpack_codes
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.core.search_plan import entropy_shift, plan_search
from irq_convert.core.spec import QuantSpec

TILE_WEIGHTS = 1 << 20
COPY_CHUNK = 8 << 20
OFFSET_LIMIT = 2**21
ENTROPY_TOLERANCE = 1e-6
ERROR_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Measured:
    """Sums over one tensor in float64: squared errors, squares, and bits of all codes."""

    weights: int
    squared_error: float
    energy: float
    code_bits: float

    @property
    def relative_error(self) -> float:
        return self.squared_error / self.energy if self.energy else 0.0

    @property
    def entropy(self) -> float:
        """Mean bits a code."""
        return self.code_bits / max(1, self.weights)


def tiles(shape: BlockShape) -> Iterator[tuple[int, int]]:
    """Rows `(start, stop)` of tiles that `read_quantized` can read."""
    step = shape.tile_rows(TILE_WEIGHTS)
    for start in range(0, shape.rows, step):
        yield start, min(shape.rows, start + step)


def source_tiles(
    reader: TileReader, tensor: StoredTensor, dense: TensorInfo
) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows of `dense`, the source of `tensor` or its decoded twin, as `tensor` has them.

    `(start, [rows, cols])` in the dtype of the file, by the tiles of `tiles`.
    """
    step = tensor.shape.tile_rows(TILE_WEIGHTS)
    return row_tiles(reader, dense, step, tensor.format.transposed)


def check_values(reader: TileReader, tensor: StoredTensor) -> str | None:
    """The first stored number that the format forbids, as one line; None when all are legal."""
    shape = tensor.shape
    unused = 8 * shape.row_bytes - shape.cols * shape.bits
    for start, stop in tiles(shape):
        for suffix in ("_scale", "_tau"):
            stored = read_part(reader, tensor, suffix, start, stop)
            grid = None
            if tensor.parts[suffix].dtype == "U8":
                grid = read_part(reader, tensor, f"{suffix}_grid", start, stop)
                wrong = _bad_grid(stored, grid, shape.tile(start).groups)
                if wrong:
                    return _line(tensor, f"{suffix}_grid", wrong)
            wrong = _bad_statistic(suffix, expand_statistic(stored, grid), start)
            if wrong:
                return _line(tensor, suffix, wrong)
        if unused:
            last = read_part(reader, tensor, "", start, stop)[:, -1]
            row = _first(last >> (8 - unused) != 0)
            if row is not None:
                wrong = f"row {start + row} ends in unused bits that are not 0"
                return _line(tensor, "", wrong)
    return None


def _line(tensor: StoredTensor, suffix: str, wrong: str) -> str:
    part = tensor.parts[suffix]
    return f"{part.name} in {part.shard.name} {list(part.shape)}: {wrong}: {WAY_OUT}"


def _first(bad: torch.Tensor) -> int | None:
    """Flat index of the first True."""
    return int(bad.reshape(-1).to(torch.uint8).argmax()) if bool(bad.any()) else None


def _bad_grid(stored: torch.Tensor, grid: torch.Tensor, before: int) -> str | None:
    """What is wrong with `grid`, `[groups, 2]` of (step, offset), after `before` other groups."""
    step, offset = grid[:, 0], grid[:, 1]
    row = _first(~(torch.isfinite(step) & (step >= 0)))
    if row is not None:
        return f"group {before + row} has step {step[row]:g}, which must be finite and at least 0"
    row = _first(~((offset == offset.round()) & (offset.abs() < OFFSET_LIMIT)))
    if row is not None:
        return (
            f"group {before + row} has offset {offset[row]:.9g}, which must be an integer below "
            "2^21 in magnitude"
        )
    sums = expand_statistic(stored, torch.stack([torch.ones_like(step), offset], dim=1))
    at = _first(sums.abs() >= OFFSET_LIMIT)
    if at is not None:
        return f"group {before + at // GROUP_SIZE} has a code + offset of 2^21 or more in magnitude"
    return None


def _bad_statistic(suffix: str, values: torch.Tensor, start: int) -> str | None:
    bad = ~torch.isfinite(values)
    if suffix == "_scale":
        bad |= values < 0
    at = _first(bad)
    if at is None:
        return None
    row, block = divmod(at, values.shape[1])
    rule = "finite and at least 0" if suffix == "_scale" else "finite"
    value = values[row, block]
    return f"row {start + row}, block {block} stands for {value:g}, which must be {rule}"


def measure_tensor(reader: TileReader, tensor: StoredTensor, source: TensorInfo) -> Measured:
    """Compare `tensor` with its source, in float64, and count its codes."""
    error = energy = bits = 0.0
    for start, rows in source_tiles(reader, tensor, source):
        stored = read_quantized(reader, tensor, start, start + rows.shape[0])
        dense = rows.double()
        energy += float(dense.square().sum())
        error += float(dense.sub_(dequantize_tensor(stored)).square_().sum())
        bits += _code_bits(stored)
    return Measured(tensor.weights, error, energy, bits)


def _code_bits(stored: QuantizedTensor) -> float:
    """Sum over blocks of length times `-sum p log2 p`, p the shares of the block's codes."""
    shape = stored.shape
    levels = 1 << shape.bits
    codes = unpack_codes(stored.codes, shape.bits, shape.cols).to(torch.int64)
    block = torch.arange(shape.cols) // shape.block_size
    rows = torch.arange(shape.rows)[:, None] * shape.blocks_per_row
    keys = codes.add_((rows + block) * levels)
    counts = keys.reshape(-1).bincount(minlength=shape.blocks * levels)
    counts = counts.reshape(shape.rows, shape.blocks_per_row, levels).double()
    lengths = block.bincount(minlength=shape.blocks_per_row)[None, :, None]
    nats = torch.special.entr(counts / lengths) * lengths
    return float(nats.sum()) / math.log(2)


def entropy_tolerance(shape: BlockShape) -> float:
    """Allowed difference in bits a code: 1e-6 and what a table of rounded logarithms can add."""
    rounding = (1 << shape.bits) * 0.5 / 2 ** entropy_shift(shape.block_size)
    return ENTROPY_TOLERANCE + rounding * shape.blocks / max(1, shape.rows * shape.cols)


def error_tolerance(tensor: StoredTensor, relative_error: float) -> float:
    """Allowed difference of a relative error: 1e-3 of it, and what fixed point can add.

    A writer may round each weight to a fixed-point step of 2^-bits of its block's largest. By
    Cauchy and Schwarz that moves the squared error e of n weights of energy E by at most
    2 sqrt(e d) + d with d = n 4^-bits E; it shows where e is tiny.
    """
    shape, fmt = tensor.shape, tensor.format
    bits = plan_search(QuantSpec(fmt.codebook, fmt.block_size)).fixed_bits
    d = min(shape.cols, shape.block_size) * 4.0**-bits
    return ERROR_TOLERANCE * relative_error + 2 * math.sqrt(relative_error * d) + d


def first_difference(
    reader: TileReader, tensor: StoredTensor, source: TensorInfo, spec: QuantSpec
) -> str | None:
    """Quantize the source again and name the first stored part and row that is not the same."""
    for start, dense in source_tiles(reader, tensor, source):
        fresh = quantize_tensor(dense, spec, name=tensor.name).parts()
        stored = read_quantized(reader, tensor, start, start + dense.shape[0])
        for suffix, part in stored.parts().items():
            # Bytes, so that a NaN equals itself.
            same = part.view(torch.uint8) == fresh[suffix].view(torch.uint8)
            row = _first(~same.all(dim=1))
            if row is not None:
                grid = suffix.endswith("_grid")
                first = tensor.shape.tile(start).groups if grid else start
                where = f"{'group' if grid else 'row'} {first + row}"
                return (
                    f"{part_name(tensor, suffix)}: differs from what its source gives, first in "
                    f"{where}: {WAY_OUT}"
                )
    return None


def part_name(tensor: StoredTensor, suffix: str) -> str:
    """The part and its file."""
    part = tensor.parts[suffix]
    return f"{part.name} in {part.shard.name}"


def copy_difference(
    reader: TileReader, copied: TensorInfo, source: TensorInfo, advance: Callable[[int], None]
) -> str | None:
    """Compare a copied tensor with its source byte for byte; None when they are equal."""
    at = 0
    pairs = zip(
        reader.iter_bytes(copied, COPY_CHUNK), reader.iter_bytes(source, COPY_CHUNK), strict=True
    )
    found = None
    for mine, original in pairs:
        if found is None:
            bad = np.flatnonzero(np.frombuffer(mine, np.uint8) != np.frombuffer(original, np.uint8))
            if bad.size:
                found = (
                    f"{copied.name} in {copied.shard.name} {list(copied.shape)}: differs from the "
                    f"source at byte {at + int(bad[0])} of {copied.nbytes}: {WAY_OUT}"
                )
        at += len(mine)
        advance(len(mine))
    return found
