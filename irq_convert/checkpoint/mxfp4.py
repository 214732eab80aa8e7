"""MXFP4: two numbers of four bits in a byte, and a power of two for every 32 of them.

A stack of experts is stored as `X_blocks` `[experts, outputs, groups, 16]` and `X_scales`
`[experts, outputs, groups]`, both U8; the tensor X that it stands for has inputs in its rows,
`[experts, inputs, outputs]`, so that columns of X are rows of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from irq_convert.checkpoint.buffers import torch_dtype
from irq_convert.checkpoint.dense_rows import POWERS, DenseRows, chunk_rows, round_into
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.lazy import lazy_info
from irq_convert.errors import IrqError

if TYPE_CHECKING:
    from irq_convert.checkpoint.reader import TileReader

_GROUP, _BYTES = 32, 16
_NO_SCALE = 255
_BLOCKS, _SCALES = "_blocks", "_scales"
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# By numpy: a model that is being built sets torch's default dtype and device, also for imports.
_LEVELS = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)
_PAIRS = torch.from_numpy(np.stack([np.tile(_LEVELS, 16), np.repeat(_LEVELS, 16)], 1))
_PAIRS_AS_ITEMS = _PAIRS.view(torch.float64).view(-1)
"""Both numbers of every byte, the low half first: taking 64 bits at a time is fast."""


@dataclass(frozen=True)
class Mxfp4(DenseRows):
    """The dense stack `[experts, inputs, outputs]` of its blocks and scales."""

    blocks: TensorInfo
    scales: TensorInfo

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        return self.blocks, self.scales

    def with_sources(self, sources: tuple[TensorInfo, ...]) -> Mxfp4:
        return Mxfp4(*sources)

    def width(self) -> int:
        return self.blocks.shape[1]

    def decode(self, reader: TileReader, info: TensorInfo, first: int, out: torch.Tensor) -> None:
        """Rows of the dense tensor are columns of the file, a few bytes in each of its rows.

        So its rows are read whole: a read for each of them would take longer.
        """
        _, outputs, groups, _ = self.blocks.shape
        inputs, done = groups * _GROUP, 0
        while done < out.shape[0]:
            expert, at = divmod(first + done, inputs)
            count = min(inputs - at, out.shape[0] - done)
            low, high = at // _GROUP, -(-(at + count) // _GROUP)
            skip, begin = at - low * _GROUP, expert * outputs
            for row, tile in self._stored(reader, begin, begin + outputs, low, high):
                part = tile[:, skip : skip + count].T
                round_into(out[done : done + count, row : row + tile.shape[0]], part, info)
            done += count

    def columns(
        self, reader: TileReader, info: TensorInfo, matrix: int, start: int, stop: int
    ) -> torch.Tensor:
        """Columns of an expert, as the transpose of rows that lie together in the file."""
        _, outputs, groups, _ = self.blocks.shape
        inputs = groups * _GROUP
        if info.shape[-2:] != (inputs, outputs):
            return super().columns(reader, info, matrix, start, stop)
        out = torch.empty((stop - start, inputs), dtype=torch_dtype(info.dtype))
        begin = matrix * outputs
        for row, tile in self._stored(reader, begin + start, begin + stop, 0, groups):
            round_into(out[row : row + tile.shape[0]], tile, info)
        return out.T

    def _stored(
        self, reader: TileReader, first: int, last: int, low: int, high: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows `first` to `last` of the file, groups `low` to `high` of each, in float32.

        Some rows at a time, each time with the number of the first of them.
        """
        experts, outputs, groups, _ = self.blocks.shape
        blocks = replace(self.blocks, shape=(experts * outputs, groups * _BYTES))
        scales = replace(self.scales, shape=(experts * outputs, groups))
        step = chunk_rows(groups * _GROUP)
        for row in range(first, last, step):
            stop = min(last, row + step)
            packed = reader.read_rows(blocks, row, stop)[:, low * _BYTES : high * _BYTES]
            exponents = reader.read_rows(scales, row, stop)[:, low:high]
            if bool((exponents == _NO_SCALE).any()):
                raise IrqError(
                    f"{scales.shard}: {scales.name} has a scale of {_NO_SCALE}, which in MXFP4 is "
                    "no number: the file is damaged, download it again"
                )
            yield row - first, _decoded(packed, exponents)


def _decoded(packed: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    values = torch.index_select(_PAIRS_AS_ITEMS, 0, packed.reshape(-1).int()).view(torch.float32)
    powers = torch.index_select(POWERS, 0, exponents.reshape(-1).int())
    values.view(-1, _GROUP).mul_(powers.unsqueeze(1))
    return values.view(packed.shape[0], 2 * packed.shape[1])


def decode_mxfp4(tensors: Mapping[str, TensorInfo], dtype: str) -> dict[str, TensorInfo]:
    """`tensors` with every pair of blocks and scales as the dense stack, in `dtype`.

    Raises `IrqError` for blocks without scales, or the other way round, in another shape than the
    format has, or for a stack that is there twice.
    """
    found = {}
    for name, info in tensors.items():
        stem = name.removesuffix(_SCALES)
        if stem != name and info.dtype == "U8":
            if stem + _BLOCKS not in tensors:
                raise _alone(info, stem + _BLOCKS)
            continue
        stem = name.removesuffix(_BLOCKS)
        if stem == name or info.dtype != "U8":
            found[name] = info
            continue
        if stem + _SCALES not in tensors:
            raise _alone(info, stem + _SCALES)
        if stem in tensors:
            raise IrqError(
                f"{info.shard}: {name} is there beside {stem}, which it stands for; keep one of "
                "the two"
            )
        found[stem] = _dense(stem, info, tensors[stem + _SCALES], dtype)
    return found


def _dense(name: str, blocks: TensorInfo, scales: TensorInfo, dtype: str) -> TensorInfo:
    if len(blocks.shape) != 4 or blocks.shape[-1] != _BYTES:
        raise IrqError(
            f"{blocks.shard}: {blocks.name} is {list(blocks.shape)}; MXFP4 has blocks of "
            f"[experts, outputs, groups, {_BYTES}]: give the original model, in bfloat16"
        )
    if scales.dtype != "U8" or scales.shape != blocks.shape[:-1]:
        raise IrqError(
            f"{scales.shard}: {scales.name} is {scales.dtype} {list(scales.shape)}; its blocks "
            f"{list(blocks.shape)} need U8 {list(blocks.shape[:-1])}: get all files of one release"
        )
    experts, outputs, groups, _ = blocks.shape
    return lazy_info(name, dtype, (experts, groups * _GROUP, outputs), Mxfp4(blocks, scales))


def _alone(info: TensorInfo, missing: str) -> IrqError:
    return IrqError(
        f"{info.shard}: {info.name} {list(info.shape)} is one half of an MXFP4 tensor, and "
        f"{missing} is in no file: get all files of the release"
    )
