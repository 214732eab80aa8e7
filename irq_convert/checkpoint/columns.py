"""Matrices whose transpose is wanted, read and written as a stream.

Some layers keep their inputs in the rows of the file: `[..., inputs, outputs]`. One row of the
transpose is then a column, spread over the whole matrix. So columns are taken in panels: a panel
is read row by row, each time a long run of bytes, and cut into tiles in memory. Every byte is read
or written once, and memory is bounded by a panel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch

from irq_convert.checkpoint.buffers import tensor_bytes, torch_dtype
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.writer import ShardWriter

PANEL_BYTES = 48 << 20
"""Above the 32 MiB up to which an allocator keeps what is freed, so that one is there at a time."""


def panel_rows(width: int, itemsize: int, step: int) -> int:
    """Rows of the transpose, each of `width` items, in a panel: a multiple of `step`."""
    return max(1, PANEL_BYTES // max(1, width * itemsize * step)) * step


def pieces(start: int, stop: int, outputs: int) -> Iterator[tuple[int, int, int]]:
    """Rows `start .. stop` of stacked transposes as `(matrix, first column, last column)`.

    `outputs` are the rows of one transpose, the columns of one matrix in the file.
    """
    edges = [start, *range((start // outputs + 1) * outputs, stop, outputs), stop]
    for low, high in pairwise(edges):
        if low < high:
            matrix = low // outputs
            yield matrix, low - matrix * outputs, high - matrix * outputs


def row_tiles(
    reader: TileReader, info: TensorInfo, step: int, transposed: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows of `info`, or of its transpose, `step` at a time, as `(start, [up to step, inputs])`.

    Leading dimensions are flattened to rows; the dtype is the file's.
    """
    if transposed:
        yield from transposed_tiles(reader, info, step)
        return
    cols = info.shape[-1]
    flat = replace(info, shape=(info.numel // max(1, cols), cols))
    for start in range(0, flat.shape[0], step):
        yield start, reader.read_rows(flat, start, min(flat.shape[0], start + step))


def transposed_tiles(
    reader: TileReader, info: TensorInfo, step: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """The tensor `[..., inputs, outputs]` as rows of its transpose, `step` at a time.

    Yields `(start, rows)`, rows being contiguous `[up to step, inputs]` of the file's dtype;
    the transposes of all matrices lie one after the other.
    """
    inputs, outputs = info.shape[-2:]
    rows = info.numel // max(1, inputs)
    panel = panel_rows(inputs, torch_dtype(info.dtype).itemsize, step)
    for first in range(0, rows, panel):
        last = min(rows, first + panel)
        blocks = [
            reader.read_columns(info, matrix, low, high).T
            for matrix, low, high in pieces(first, last, outputs)
        ]
        starts = [first]
        for block in blocks:
            starts.append(starts[-1] + block.shape[0])
        for start in range(first, last, step):
            stop = min(last, start + step)
            parts = [
                block[max(start, low) - low : stop - low]
                for low, block in zip(starts, blocks, strict=False)
                if low < stop and start < low + block.shape[0]
            ]
            yield start, torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
        del blocks, block, parts  # before the next panel is read


class TransposedWriter:
    """Collects rows of a transpose and writes them as columns, a panel at a time.

    `write(data, offset)` gets bytes of the tensor `shape` `[..., inputs, outputs]`. Rows must come
    in order and without gaps; the last ones complete the tensor.
    """

    def __init__(
        self, shape: tuple[int, ...], write: Callable[[memoryview, int], None], itemsize: int
    ) -> None:
        self._inputs, self._outputs = shape[-2:]
        self._rows = 1
        for dim in (*shape[:-2], shape[-1]):
            self._rows *= dim
        self._write = write
        self._panel = panel_rows(self._inputs, itemsize, 1)
        self._waiting: list[torch.Tensor] = []
        self._first = self._count = 0

    @classmethod
    def of(
        cls, writer: ShardWriter, name: str, shape: tuple[int, ...], dtype: str
    ) -> TransposedWriter:
        """Writes tensor `name` of a shard, of the safetensors `dtype`."""
        return cls(shape, partial(writer.write, name), torch_dtype(dtype).itemsize)

    def add(self, rows: torch.Tensor) -> None:
        """Take the next rows, `[n, inputs]` in the dtype of the file."""
        self._waiting.append(rows)
        self._count += rows.shape[0]
        if self._count >= self._panel or self._first + self._count == self._rows:
            self._flush()

    def _flush(self) -> None:
        panel = torch.cat(self._waiting)
        stop = self._first + self._count
        for matrix, low, high in pieces(self._first, stop, self._outputs):
            begin = matrix * self._outputs + low - self._first
            columns = panel[begin : begin + high - low].T.contiguous()
            base = matrix * self._inputs * self._outputs
            size = columns.element_size()
            if high - low == self._outputs:
                self._write(tensor_bytes(columns), base * size)
                continue
            view, width = tensor_bytes(columns), (high - low) * size
            for row in range(self._inputs):
                at = (base + row * self._outputs + low) * size
                self._write(view[row * width : (row + 1) * width], at)
        self._waiting, self._first, self._count = [], stop, 0
