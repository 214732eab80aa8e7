"""Writing a GGUF file as a stream: read a tile, encode it, write it; the three overlap.

Memory holds a few tiles, whatever the size of a tensor or of the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType

from irq_convert.artifact.contents import read_quantized
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.files import atomic_file
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.jobs.common.streams import BackgroundWriter, prefetched
from irq_convert.jobs.export.folder import tile_starts
from irq_convert.jobs.export.gguf.encode import encode_dense, encode_q4_1
from irq_convert.jobs.export.gguf.names import interleave
from irq_convert.jobs.export.gguf.plan import GgufFile, GgufTensor
from irq_convert.jobs.export.target import Difference, ExportPlan, TargetResult
from irq_convert.jobs.export.tiles import difference
from irq_convert.progress import Progress


@dataclass(frozen=True)
class _Tile:
    """Rows from `start` on, as the artifact has them and in its order."""

    tensor: GgufTensor
    start: int
    data: QuantizedTensor | torch.Tensor
    last: bool


def write_file(plan: ExportPlan, folder: Path, progress: Progress) -> TargetResult:
    """Write the file of `plan` into `folder`, whole or not at all.

    Raises `IrqError`, naming the tensor, when something cannot be read, represented or written.
    """
    file: GgufFile = plan.detail
    sums: dict[str, Difference] = {}
    progress.phase("exporting", len(file.tensors), sum(t.nbytes for t in file.tensors))
    with (
        atomic_file(folder / file.name, file.nbytes) as fd,
        BackgroundWriter() as background,
        TileReader() as reader,
        prefetched(_tiles(file, reader, plan.options.tile_weights)) as tiles,
    ):
        os.ftruncate(fd, file.nbytes)  # what lies between tensors is zeros
        background.submit(_pwrite, fd, memoryview(file.header), 0)
        for tile in tiles:
            data, seen = _encode(tile)
            row = data.shape[1]
            background.submit(
                _pwrite, fd, memoryview(data.reshape(-1).view(np.uint8).data), _place(tile, row)
            )
            sums[seen.name] = sums[seen.name] + seen if seen.name in sums else seen
            progress.advance(data.nbytes, finished=tile.last)
    return _written(file, sums)


def _place(tile: _Tile, row_nbytes: int) -> int:
    return tile.tensor.offset + tile.start * row_nbytes


def _pwrite(fd: int, view: memoryview, at: int) -> None:
    while view:
        count = os.pwrite(fd, view[: 1 << 30], at)
        view, at = view[count:], at + count


def _tiles(file: GgufFile, reader: TileReader, tile_weights: int) -> Iterator[_Tile]:
    for tensor in file.tensors:
        source = tensor.source
        if source is None:
            assert tensor.data is not None
            yield _Tile(tensor, 0, tensor.data[None], last=True)
        elif isinstance(source, StoredTensor):
            for start, stop in tile_starts(source, _head_rows(tensor), tile_weights):
                tile = read_quantized(reader, source, start, stop)
                yield _Tile(tensor, start, tile, last=stop == source.shape.rows)
        elif len(source.shape) < 2:
            yield _Tile(tensor, 0, reader.read_rows(source, 0, 1), last=True)
        else:
            yield from _dense_tiles(tensor, source, reader, tile_weights)


def _dense_tiles(
    tensor: GgufTensor, info: TensorInfo, reader: TileReader, tile_weights: int
) -> Iterator[_Tile]:
    rows, cols = info.shape
    step = _head_rows(tensor)
    step *= max(1, tile_weights // max(1, step * cols))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield _Tile(tensor, start, reader.read_rows(info, start, stop), last=stop == rows)


def _head_rows(tensor: GgufTensor) -> int:
    """What tiles must begin on: rows change places within a head."""
    heads = tensor.place.heads
    return tensor.place.shape[0] // heads if heads else 1


def _encode(tile: _Tile) -> tuple[np.ndarray, Difference]:
    """The bytes of a tile in the file's order of rows, and how far they are from the artifact."""
    tensor, data = tile.tensor, tile.data
    name = tensor.place.name if tensor.source is None else tensor.source.name
    if not isinstance(data, QuantizedTensor):
        if len(tensor.place.shape) < 2 and tensor.place.heads:
            data = interleave(data[0], tensor.place.heads)[None]
        encoded = encode_dense(data, tensor.kind, name)
        exact = data
    else:
        exact = dequantize_tensor(data)
        if tensor.kind == GgmlType.Q4_1:
            encoded = encode_q4_1(data, name)
        else:
            encoded = encode_dense(exact, tensor.kind, name)
    seen = difference(name, exact, torch.from_numpy(encoded.values))
    rows = encoded.data
    if tensor.place.heads and len(tensor.place.shape) > 1:
        rows = interleave(rows, len(rows) // _head_rows(tensor))
    return np.ascontiguousarray(rows), seen


def _written(file: GgufFile, sums: dict[str, Difference]) -> TargetResult:
    """What was measured: quantized tensors one by one, other matrices where they lost anything."""
    quantized, notes = [], []
    for tensor in file.tensors:
        if tensor.source is None:
            continue
        seen = sums[tensor.source.name]
        if isinstance(tensor.source, StoredTensor):
            quantized.append(seen)
        elif seen.largest:
            notes.append(
                f"{seen.name} as {tensor.kind.name}: largest difference {seen.largest:.3g} of "
                f"weights up to {seen.peak:.3g}, relative error {seen.relative_error:.3g}"
            )
    return TargetResult(quantized, tuple(notes))
