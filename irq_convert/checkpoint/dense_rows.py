"""What decoded tensors share: any rows of any view of theirs, decoded a million at a time."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch

from irq_convert.checkpoint.buffers import torch_dtype
from irq_convert.checkpoint.header import TensorInfo, matrix_shape
from irq_convert.checkpoint.lazy import LazyTensor
from irq_convert.errors import IrqError

if TYPE_CHECKING:
    from irq_convert.checkpoint.reader import TileReader

CHUNK_ELEMENTS = 1 << 20
"""Numbers that are decoded in float32 at a time, beside the tile that is asked for."""

# By numpy: a model that is being built sets torch's default dtype and device, also for imports.
POWERS = torch.from_numpy(np.array([*(2.0 ** (byte - 127) for byte in range(255)), np.inf], "f4"))
"""The scale that every byte means, as float32: that of byte 255 is infinite."""


def chunk_rows(cols: int) -> int:
    """Rows of `cols` numbers in a chunk."""
    return max(1, CHUNK_ELEMENTS // max(1, cols))


def round_into(out: torch.Tensor, values: torch.Tensor, info: TensorInfo) -> None:
    """Round float32 `values` to the dtype of `out`, once.

    Raises `IrqError` where a finite number would become infinite, which only float16 does.
    """
    out.copy_(values)
    if out.dtype is torch.float16 and bool((out.isinf() & values.isfinite()).any()):
        largest = float(values[values.isfinite()].abs().max())
        raise IrqError(
            f"{info.shard}: {info.name} stands for {largest:.6g}, which is too large for float16, "
            "the dtype in config.json: set it to bfloat16 there"
        )


class DenseRows(LazyTensor):
    """A tensor that is decoded in rows of its last dimension, however it is looked at."""

    @abstractmethod
    def width(self) -> int:
        """The last dimension of the tensor."""

    @abstractmethod
    def decode(self, reader: TileReader, info: TensorInfo, first: int, out: torch.Tensor) -> None:
        """Fill `out`, rows from `first` on, leading dimensions being flattened to rows."""

    def rows(self, reader: TileReader, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        asked, width = matrix_shape(info)[1], self.width()
        begin, end = start * asked, stop * asked
        first, last = (begin // width, -(-end // width)) if end > begin else (0, 0)
        out = torch.empty((last - first, width), dtype=torch_dtype(info.dtype))
        self.decode(reader, info, first, out)
        at = begin - first * width
        return out.view(-1)[at : at + end - begin].view(stop - start, asked)
