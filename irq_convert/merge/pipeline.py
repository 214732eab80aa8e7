"""Merge one shard as a stream: read a tile, change it, write it; the three overlap.

Memory holds a few tiles and the two small matrices of one layer, whatever the size of a tensor, a
shard or the model. The tools are those of `irq_convert.convert.pipeline`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from irq_convert.adapters.stored import FLOATS, StoredAdapter, read_layer
from irq_convert.artifact.config import ModuleFormat
from irq_convert.artifact.contents import read_quantized, write_quantized
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.buffers import tensor_bytes, torch_dtype
from irq_convert.checkpoint.cast import cast_bytes, narrow
from irq_convert.checkpoint.columns import TransposedWriter
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.writer import ShardWriter
from irq_convert.convert.streams import Behind, prefetched
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.errors import IrqError
from irq_convert.jobs.progress import Progress
from irq_convert.merge.delta import Delta
from irq_convert.merge.options import MergeOptions
from irq_convert.merge.outcome import Outcome, measure, sum_of_squares
from irq_convert.merge.plan import Job, Shard
from irq_convert.merge.tau import move_tau

COPY_CHUNK = 4 << 20


@dataclass(frozen=True)
class Means:
    """What tiles are changed with: the adapter and the options."""

    adapter: StoredAdapter | None
    options: MergeOptions


@dataclass(frozen=True)
class _Piece:
    """Rows from `start` on, quantized or dense; or plain bytes from byte `start` on."""

    job: Job
    start: int
    data: QuantizedTensor | torch.Tensor | bytes
    last: bool


def merge_shard(shard: Shard, folder: Path, means: Means, progress: Progress) -> dict[str, Outcome]:
    """Write `shard` into `folder`, whole or not at all; returns what became of quantized tensors.

    Raises `IrqError`, naming the tensor, when something cannot be read or written, or when a
    merged number is not finite in the dtype asked for.
    """
    outcomes: dict[str, Outcome] = {}
    delta: Delta | None = None
    turned: TransposedWriter | None = None
    with (
        ShardWriter(folder / shard.name, shard.outputs) as writer,
        Behind() as behind,
        TileReader() as reader,
        prefetched(_pieces(shard, reader, means.options)) as pieces,
    ):
        for piece in pieces:
            job = piece.job
            if piece.start == 0:
                delta = read_delta(reader, means.adapter, job)
            if isinstance(piece.data, QuantizedTensor) and isinstance(job.target, ModuleFormat):
                tile, seen = _requantized(piece.data, job, piece.start, delta, means)
                outcomes[job.name] = outcomes[job.name] + seen if piece.start else seen
                behind.submit(write_quantized, writer, job.name, job.blocks, piece.start, tile)
                size = sum(part.nbytes for part in tile.parts().values())
            elif isinstance(piece.data, QuantizedTensor) and job.transposed:
                if piece.start == 0:
                    turned = _turned(job, writer)
                assert turned is not None
                rows = _dense_rows(piece, delta)
                behind.submit(turned.add, rows)
                size = rows.nbytes
            else:
                data, at = _dense(piece, delta)
                behind.submit(writer.write, job.name, data, at)
                size = len(data)
            progress.advance(size, finished=piece.last)
    return outcomes


def read_delta(reader: TileReader, adapter: StoredAdapter | None, job: Job) -> Delta | None:
    """What the adapter adds to the tensor of `job`; None for one that it leaves alone."""
    found = job.adapted
    if adapter is None or found is None:
        return None
    values = read_layer(reader, adapter.config, found.layer)
    return Delta.fold(values, found.layer.scaling, found.cols, found.block_size)


def _pieces(shard: Shard, reader: TileReader, options: MergeOptions) -> Iterator[_Piece]:
    for job in shard.jobs:
        base = job.base
        if isinstance(base, StoredTensor):
            step = base.shape.tile_rows(options.tile_weights)
            for start in range(0, base.shape.rows, step):
                stop = min(base.shape.rows, start + step)
                tile = read_quantized(reader, base, start, stop)
                yield _Piece(job, start, tile, last=stop == base.shape.rows)
        elif job.adapted is not None:
            rows, cols = job.shape
            step = max(1, options.tile_weights // max(1, cols))
            for start in range(0, rows, step):
                stop = min(rows, start + step)
                yield _Piece(job, start, reader.read_rows(base, start, stop), last=stop == rows)
        else:
            yield from _copied(job, job.saved or base, reader)


def _copied(job: Job, source: TensorInfo, reader: TileReader) -> Iterator[_Piece]:
    at = 0
    for chunk in reader.iter_bytes(source, COPY_CHUNK):
        at += len(chunk)
        # The reader reuses its buffer, and the writer is behind.
        yield _Piece(job, at - len(chunk), bytes(chunk), last=at == source.nbytes)
    if not source.nbytes:
        yield _Piece(job, 0, b"", last=True)


def _dense(piece: _Piece, delta: Delta | None) -> tuple[memoryview | bytes, int]:
    """Bytes to write for `piece` and where: changed in float64 and rounded once to the dtype."""
    if isinstance(piece.data, bytes):
        return _cast(piece, piece.data)
    result = _dense_rows(piece, delta)
    return tensor_bytes(result), piece.start * result.shape[1] * result.element_size()


def _dense_rows(piece: _Piece, delta: Delta | None) -> torch.Tensor:
    """Rows of a result: changed in float64 and rounded once to the dtype."""
    job, data = piece.job, piece.data
    assert isinstance(job.target, str)
    assert not isinstance(data, bytes)
    if isinstance(data, QuantizedTensor):
        data = dequantize_tensor(data)
    stop = piece.start + data.shape[0]
    exact = data if delta is None else delta.rows(piece.start, stop).add_(data)
    return narrow(exact, job.target, job.name)


def _turned(job: Job, writer: ShardWriter) -> TransposedWriter:
    """Writes rows of a tensor that the source has transposed where the source has them."""
    assert isinstance(job.target, str)
    write = partial(writer.write, job.name)
    return TransposedWriter(job.shape, write, torch_dtype(job.target).itemsize)


def _cast(piece: _Piece, data: bytes) -> tuple[memoryview | bytes, int]:
    """Copied bytes as they are, or in another floating dtype."""
    job = piece.job
    source = job.saved or job.base
    assert isinstance(source, TensorInfo)
    assert isinstance(job.target, str)
    if data and job.saved is not None and source.dtype in FLOATS:
        values = torch.frombuffer(bytearray(data), dtype=torch_dtype(source.dtype))
        if not bool(values.isfinite().all()):
            raise IrqError(
                f"{source.shard.name}: {source.name} holds NaN or infinite numbers: training has "
                "failed; take an earlier checkpoint of the adapter"
            )
    return cast_bytes(data, piece.start, source.dtype, job.target, job.name)


def _requantized(
    q: QuantizedTensor, job: Job, start: int, delta: Delta | None, means: Means
) -> tuple[QuantizedTensor, Outcome]:
    """The tile in the result's format, and what that did to it."""
    assert isinstance(job.target, ModuleFormat)
    assert isinstance(job.base, StoredTensor)
    base = dequantize_tensor(q)
    if delta is None or (delta.is_zero and job.target == job.base.format):
        return q, Outcome(sum_of_squares(base))
    stop = start + base.shape[0]
    if delta.block_size is not None:
        tile, costs = move_tau(q, delta, start, means.options.tau, job.name)
        seen = measure(base, delta.rows(start, stop), dequantize_tensor(tile))
        return tile, replace(seen, tau=costs)
    assert job.again is not None
    change = delta.rows(start, stop)
    wanted = (change + base).to(torch.float32)
    tile, stats = quantize_with_stats(
        wanted, job.again, threads=means.options.threads, name=f"{job.name} (merged)"
    )
    return tile, replace(measure(base, change, dequantize_tensor(tile)), stats=stats)
