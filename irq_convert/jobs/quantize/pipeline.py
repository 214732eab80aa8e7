"""Convert one shard as a stream: read a tile, search it, write it; the three overlap.

Memory holds a few tiles, whatever the size of a tensor, a shard or the model. On a GPU the reader's
thread also uploads and the writer's downloads, so that five things go on at once: disk to host,
host to device, search, device to host, host to disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.contents import write_quantized
from irq_convert.checkpoint.buffers import torch_dtype
from irq_convert.checkpoint.columns import transposed_tiles
from irq_convert.checkpoint.fetcher import ReadOrder
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.planned_folder import PlannedShard, copied
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.writer import ShardWriter
from irq_convert.core.importance import Shares
from irq_convert.core.quantize import quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.tensor_stats import TensorStats
from irq_convert.jobs.calibration.loop import Calibrated
from irq_convert.jobs.common.streams import BackgroundWriter, prefetched
from irq_convert.jobs.quantize.device_tiles import Engine, Ring, Slot, make_engine
from irq_convert.jobs.quantize.importance import Weighing
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import TensorPlan
from irq_convert.progress import Progress


@dataclass(frozen=True)
class _Piece:
    """Part of a source tensor: rows to quantize, in a slot, or bytes to copy from `start` on.

    `name` is that of the stored tensor that bytes belong to; `shares` are of the whole tensor.
    """

    tensor: TensorPlan
    name: str
    start: int
    data: torch.Tensor | bytes
    last: bool
    slot: Slot | None = None
    shares: Shares | None = None


def quantize_shard(
    shard: PlannedShard[TensorPlan],
    folder: Path,
    options: QuantizeOptions,
    progress: Progress,
    read_order: ReadOrder | None = None,
    calibrated: Calibrated | None = None,
    weighing: Weighing | None = None,
) -> dict[str, TensorStats]:
    """Write `shard` into `folder`, whole or not at all; returns statistics by tensor name.

    `read_order` brings the source's files as they are read; None when they are all there. What is
    `calibrated` is copied from there; `weighing` says how much the columns of the rest count.
    Raises `IrqError` when the source cannot be read, has weights that cannot be quantized (naming
    the tensor), or the disk refuses.
    """
    stats = {} if calibrated is None else {
        tensor.name: calibrated.stats[tensor.name]
        for tensor in shard.tensors
        if tensor.name in calibrated.stats
    }  # fmt: skip
    engine = make_engine(options.device)
    ring = Ring(engine)
    with (
        ShardWriter(folder / shard.name, shard.outputs) as writer,
        BackgroundWriter() as background,
        TileReader(read_order=read_order) as reader,
        prefetched(_pieces(shard, reader, ring, options, calibrated, weighing)) as pieces,
        read_order or nullcontext(),  # when the block fails, nobody waits for a download any longer
        ring,  # nor for a slot
    ):
        for piece in pieces:
            name = piece.tensor.info.name
            if piece.slot is not None:
                tile, seen = _quantize(piece, engine, options)
                ring.give(piece.slot)
                stats[name] = stats[name] + seen if name in stats else seen
                background.submit(
                    _write, engine, engine.mark(), writer, piece.tensor, piece.start, tile
                )
            else:
                assert isinstance(piece.data, bytes)
                background.submit(writer.write, piece.name, piece.data, piece.start)
            progress.advance(_size(piece.data), finished=piece.last)
    return stats


def _pieces(
    shard: PlannedShard[TensorPlan],
    reader: TileReader,
    ring: Ring,
    options: QuantizeOptions,
    calibrated: Calibrated | None,
    weighing: Weighing | None,
) -> Iterator[_Piece]:
    for tensor in shard.tensors:
        if calibrated is not None and tensor.name in calibrated.infos:
            yield from _calibrated(tensor, calibrated.infos[tensor.name])
            continue
        if tensor.spec is None:
            for start, data, last in copied(reader, tensor.info):
                yield _Piece(tensor, tensor.name, start, data, last)
            continue
        shares = None if weighing is None else weighing.shares(tensor)
        for start, slot, tile in _tiles(tensor, reader, ring, options):
            last = start + tile.shape[0] == tensor.shape.rows
            uploaded = ring.engine.upload(slot, tile)
            yield _Piece(tensor, tensor.name, start, uploaded, last, slot, shares)


def _calibrated(tensor: TensorPlan, infos: Sequence[TensorInfo]) -> Iterator[_Piece]:
    """The stored parts of a tensor that was calibrated, as they lie in its layer's file."""
    with TileReader() as reader:
        for info in infos:
            for start, data, last in copied(reader, info):
                yield _Piece(tensor, info.name, start, data, last and info is infos[-1])


def _tiles(
    tensor: TensorPlan, reader: TileReader, ring: Ring, options: QuantizeOptions
) -> Iterator[tuple[int, Slot, torch.Tensor]]:
    """Whole groups of rows as `(start, slot, tile)`, read into the slot where that is possible."""
    info, shape = tensor.info, tensor.shape
    step = shape.tile_rows(options.tile_weights)
    if tensor.transposed:
        for start, tile in transposed_tiles(reader, info, step):
            yield start, ring.take(), tile
        return
    flat = replace(info, shape=(shape.rows, shape.cols))
    for start in range(0, shape.rows, step):
        stop = min(shape.rows, start + step)
        slot = ring.take()
        out = ring.room(slot, (stop - start, shape.cols), torch_dtype(info.dtype))
        yield start, slot, reader.read_rows(flat, start, stop, out=out)


def _quantize(
    piece: _Piece, engine: Engine, options: QuantizeOptions
) -> tuple[QuantizedTensor, TensorStats]:
    """Search a tile; returns when the device is through with it."""
    assert isinstance(piece.data, torch.Tensor)
    assert piece.slot is not None
    engine.ready(piece.slot)
    return quantize_with_stats(
        piece.data,
        piece.tensor.spec,
        shares=piece.shares,
        first_row=piece.start,
        threads=options.threads,
        name=piece.tensor.info.name,
    )


def _write(
    engine: Engine,
    mark: Any,
    writer: ShardWriter,
    tensor: TensorPlan,
    start: int,
    tile: QuantizedTensor,
) -> None:
    tile = engine.fetch(tile, mark)
    write_quantized(writer, tensor.info.name, tensor.shape, start, tile)


def _size(data: torch.Tensor | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.nbytes
