"""Tensors that no file holds as they are: put together from stored ones, a tile of rows at a time.

A `TensorInfo` whose `lazy` is set has its logical dtype and shape; `TileReader` asks `lazy` for its
rows instead of reading bytes. Nothing is computed before it is read, and never more than a tile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from irq_convert.checkpoint.buffers import torch_dtype
from irq_convert.checkpoint.header import TensorInfo, matrix_shape, tensor_nbytes
from irq_convert.errors import IrqError

if TYPE_CHECKING:
    from irq_convert.checkpoint.reader import TileReader

_TILE_ELEMENTS = 1 << 21


class LazyTensor(ABC):
    """How a tensor is made of `sources`, which are stored, or lazy themselves."""

    @property
    @abstractmethod
    def sources(self) -> tuple[TensorInfo, ...]:
        """What is read for it."""

    @abstractmethod
    def rows(self, reader: TileReader, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of `info` as a matrix: contiguous `[stop - start, cols]`.

        Raises `IrqError` naming file and tensor where they cannot be read.
        """

    @abstractmethod
    def with_sources(self, sources: tuple[TensorInfo, ...]) -> LazyTensor:
        """The same of other sources."""

    def columns(
        self, reader: TileReader, info: TensorInfo, matrix: int, start: int, stop: int
    ) -> torch.Tensor:
        """Columns `start` to `stop` of matrix number `matrix` of `info`, `[rows, stop - start]`."""
        rows, cols = info.shape[-2:]
        out = torch.empty((rows, stop - start), dtype=torch_dtype(info.dtype))
        flat = replace(info, shape=(info.numel // max(1, cols), cols))
        step = max(1, _TILE_ELEMENTS // max(1, cols))
        for at in range(0, rows, step):
            end, first = min(rows, at + step), matrix * rows
            out[at:end] = self.rows(reader, flat, first + at, first + end)[:, start:stop]
        return out

    def moved(self, place: Callable[[Path], Path]) -> LazyTensor:
        """The same when its files lie where `place` says."""
        return self.with_sources(tuple(source.moved(place) for source in self.sources))

    def files(self) -> list[Path]:
        """Every file that is read for it, each once."""
        found: dict[Path, None] = {}
        for source in self.sources:
            found |= dict.fromkeys(source.files)
        return list(found)


def lazy_info(name: str, dtype: str, shape: tuple[int, ...], lazy: LazyTensor) -> TensorInfo:
    """The `TensorInfo` of a lazy tensor: at home where its first source lies."""
    first = lazy.sources[0]
    size = tensor_nbytes(dtype, shape)
    return TensorInfo(name, dtype, shape, first.shard, first.offset, size, lazy)


@dataclass(frozen=True)
class RowParts(LazyTensor):
    """Parts one below the other: `cat(parts, 0)`."""

    parts: tuple[TensorInfo, ...]

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        return self.parts

    def with_sources(self, sources: tuple[TensorInfo, ...]) -> RowParts:
        return RowParts(sources)

    def rows(self, reader: TileReader, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        found, first = [], 0
        for part in self.parts:
            last = first + part.shape[0]
            if start < last and stop > first:
                found.append(
                    reader.read_rows(part, max(start, first) - first, min(stop, last) - first)
                )
            first = last
        return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True)
class ColumnParts(LazyTensor):
    """Parts side by side: `cat(parts, 1)`."""

    parts: tuple[TensorInfo, ...]

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        return self.parts

    def with_sources(self, sources: tuple[TensorInfo, ...]) -> ColumnParts:
        return ColumnParts(sources)

    def rows(self, reader: TileReader, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        return torch.cat([reader.read_rows(part, start, stop) for part in self.parts], 1)


@dataclass(frozen=True)
class Replicas(LazyTensor):
    """One tensor that every file has; they have to be equal to the bit."""

    parts: tuple[TensorInfo, ...]

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        return self.parts

    def with_sources(self, sources: tuple[TensorInfo, ...]) -> Replicas:
        return Replicas(sources)

    def rows(self, reader: TileReader, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        first = reader.read_rows(self.parts[0], start, stop)
        for part in self.parts[1:]:
            other = reader.read_rows(part, start, stop)
            if not torch.equal(first.view(torch.uint8), other.view(torch.uint8)):
                raise IrqError(
                    f"{part.shard}: {part.name} is another than in {self.parts[0].shard.name}, "
                    "where each file has to have the same: the files are of different models"
                )
        return first


@dataclass(frozen=True)
class HalvedHeads(LazyTensor):
    """Rows of q or k from neighbouring rotary pairs to halves of a head.

    Row `2 j + s` of each of `heads` heads (s is 0 or 1) becomes its row `s * d / 2 + j`.
    """

    inner: TensorInfo
    heads: int

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        return (self.inner,)

    def with_sources(self, sources: tuple[TensorInfo, ...]) -> HalvedHeads:
        return HalvedHeads(sources[0], self.heads)

    def rows(self, reader: TileReader, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        size = self.inner.shape[0] // self.heads
        first, last = start // size, -(-stop // size)
        whole = reader.read_rows(self.inner, first * size, last * size)
        pairs = whole.view(last - first, size // 2, 2, whole.shape[1])
        halves = pairs.transpose(1, 2).reshape(whole.shape)
        return halves[start - first * size : stop - first * size].contiguous()


@dataclass(frozen=True)
class Strided(LazyTensor):
    """A view of a stored tensor's elements, as torch pickles views that are not contiguous.

    Element `[i, j, ...]` is element `first + i * strides[0] + j * strides[1] + ...` of `storage`.
    """

    storage: TensorInfo
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        return (self.storage,)

    def with_sources(self, sources: tuple[TensorInfo, ...]) -> Strided:
        return replace(self, storage=sources[0])

    def rows(self, reader: TileReader, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        if len(self.shape) == 2 and info.shape == self.shape:
            return self._matrix_rows(reader, start, stop)
        whole = self._view(reader, self.shape, self.first)
        return whole.reshape(matrix_shape(info))[start:stop].contiguous()

    def _matrix_rows(self, reader: TileReader, start: int, stop: int) -> torch.Tensor:
        """Of a transposed matrix, columns of what is stored: its rows span nearly all of it."""
        rows, cols = self.shape
        if self.strides == (1, rows):
            stored = self._stored((cols, rows), self.first)
            return reader.read_columns(stored, 0, start, stop).T.contiguous()
        first = self.first + start * self.strides[0]
        return self._view(reader, (stop - start, cols), first).contiguous()

    def _view(self, reader: TileReader, shape: tuple[int, ...], first: int) -> torch.Tensor:
        """A view of `shape` from element `first` on; reads all between its first and last."""
        if 0 in shape:
            return torch.empty(shape, dtype=torch_dtype(self.storage.dtype))
        reach = sum((size - 1) * step for size, step in zip(shape, self.strides, strict=True))
        span = reader.read_tensor(self._stored((reach + 1,), first))
        return span.as_strided(shape, self.strides)

    def _stored(self, shape: tuple[int, ...], first: int) -> TensorInfo:
        """A contiguous piece of the storage."""
        at = self.storage.offset + tensor_nbytes(self.storage.dtype, (first,))
        size = tensor_nbytes(self.storage.dtype, shape)
        return replace(self.storage, shape=shape, offset=at, nbytes=size)
