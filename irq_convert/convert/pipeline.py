"""Convert one shard as a stream: read a tile, search it, write it; the three overlap.

Memory holds a few tiles, whatever the size of a tensor, a shard or the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from irq_convert.artifact.contents import write_quantized
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.supply import Feed
from irq_convert.checkpoint.writer import ShardWriter
from irq_convert.convert.options import ConvertOptions
from irq_convert.convert.plan import ShardPlan, TensorPlan
from irq_convert.convert.progress import Progress
from irq_convert.convert.streams import Behind, prefetched
from irq_convert.core.quantize import quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.stats import TensorStats

COPY_CHUNK = 8 << 20


@dataclass(frozen=True)
class _Piece:
    """Part of a source tensor: rows to quantize, or bytes to copy from `start` on."""

    tensor: TensorPlan
    start: int
    data: torch.Tensor | bytes
    last: bool


def convert_shard(
    shard: ShardPlan,
    folder: Path,
    options: ConvertOptions,
    progress: Progress,
    feed: Feed | None = None,
) -> dict[str, TensorStats]:
    """Write `shard` into `folder`, whole or not at all; returns statistics by tensor name.

    `feed` brings the source's files as they are read; None when they are all there.
    Raises `IrqError` when the source cannot be read, has weights that cannot be quantized (naming
    the tensor), or the disk refuses.
    """
    stats: dict[str, TensorStats] = {}
    with (
        ShardWriter(folder / shard.name, shard.outputs) as writer,
        Behind() as behind,
        TileReader(feed=feed) as reader,
        prefetched(_pieces(shard, reader, options)) as pieces,
    ):
        for piece in pieces:
            name = piece.tensor.info.name
            if isinstance(piece.data, torch.Tensor):
                tile, seen = _quantize(piece, options)
                stats[name] = stats[name] + seen if name in stats else seen
                shape = piece.tensor.shape
                behind.submit(write_quantized, writer, name, shape, piece.start, tile)
            else:
                behind.submit(writer.write, name, piece.data, piece.start)
            progress.advance(_size(piece.data), finished=piece.last)
    return stats


def _pieces(shard: ShardPlan, reader: TileReader, options: ConvertOptions) -> Iterator[_Piece]:
    for tensor in shard.tensors:
        if tensor.spec is None:
            yield from _copied(tensor, reader)
            continue
        rows = tensor.shape.rows
        step = tensor.shape.tile_rows(options.tile_weights)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            data = reader.read_rows(tensor.info, start, stop)
            yield _Piece(tensor, start, data, last=stop == rows)


def _copied(tensor: TensorPlan, reader: TileReader) -> Iterator[_Piece]:
    at = 0
    for chunk in reader.iter_bytes(tensor.info, COPY_CHUNK):
        at += len(chunk)
        # The reader reuses its buffer, and the writer is behind.
        yield _Piece(tensor, at - len(chunk), bytes(chunk), last=at == tensor.info.nbytes)
    if not tensor.info.nbytes:
        yield _Piece(tensor, 0, b"", last=True)


def _quantize(piece: _Piece, options: ConvertOptions) -> tuple[QuantizedTensor, TensorStats]:
    assert isinstance(piece.data, torch.Tensor)
    return quantize_with_stats(
        piece.data.to(options.device),
        piece.tensor.spec,
        threads=options.threads,
        name=piece.tensor.info.name,
    )


def _size(data: torch.Tensor | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.nbytes
