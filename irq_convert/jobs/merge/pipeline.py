"""Merge one shard as a stream: read a tile, change it, write it; the three overlap.

Memory holds a few tiles and what an adapter has for one tensor, whatever the size of the tensor, a
shard or the model. The tools are those of `irq_convert.jobs.quantize.pipeline`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from irq_convert.artifact.adapter import StoredAdapter, read_finite, read_layer
from irq_convert.artifact.config import ModuleFormat
from irq_convert.artifact.contents import read_quantized, write_quantized
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.buffers import tensor_bytes, torch_dtype
from irq_convert.checkpoint.cast import cast_bytes, narrow
from irq_convert.checkpoint.columns import TransposedWriter
from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.planned_folder import PlannedShard, copied
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.writer import ShardWriter
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.errors import IrqError
from irq_convert.jobs.common.streams import BackgroundWriter, prefetched
from irq_convert.jobs.merge.delta import Delta
from irq_convert.jobs.merge.moves import TensorMoves, restated_change
from irq_convert.jobs.merge.options import MergeOptions
from irq_convert.jobs.merge.outcome import Outcome, measure_outcome, sum_of_squares
from irq_convert.jobs.merge.plan import MergedTensor
from irq_convert.jobs.merge.stored_moves import move_scale, move_tau
from irq_convert.progress import Progress


@dataclass(frozen=True)
class MergeSettings:
    """What tiles are changed with: the adapter and the options."""

    adapter: StoredAdapter
    options: MergeOptions


@dataclass(frozen=True)
class _Change:
    """What the adapter does to one tensor: adds to it, and moves its statistics."""

    delta: Delta | None = None
    moves: TensorMoves | None = None


@dataclass(frozen=True)
class _Piece:
    """Rows from `start` on, quantized or dense; or plain bytes from byte `start` on."""

    tensor: MergedTensor
    start: int
    data: QuantizedTensor | torch.Tensor | bytes
    last: bool


def merge_shard(
    shard: PlannedShard[MergedTensor], folder: Path, settings: MergeSettings, progress: Progress
) -> dict[str, Outcome]:
    """Write `shard` into `folder`, whole or not at all; returns what became of quantized tensors.

    Raises `IrqError`, naming the tensor, when something cannot be read or written, or when a
    merged number is not finite in the dtype asked for.
    """
    outcomes: dict[str, Outcome] = {}
    change = _Change()
    turned: TransposedWriter | None = None
    with (
        ShardWriter(folder / shard.name, shard.outputs) as writer,
        BackgroundWriter() as background,
        TileReader() as reader,
        prefetched(_pieces(shard, reader, settings.options)) as pieces,
    ):
        for piece in pieces:
            tensor = piece.tensor
            if piece.start == 0:
                change = _read_change(reader, settings.adapter, tensor)
            if isinstance(piece.data, QuantizedTensor) and isinstance(tensor.target, ModuleFormat):
                tile, seen = _requantized(piece.data, tensor, piece.start, change, settings)
                outcomes[tensor.name] = outcomes[tensor.name] + seen if piece.start else seen
                background.submit(
                    write_quantized, writer, tensor.name, tensor.blocks, piece.start, tile
                )
                size = sum(part.nbytes for part in tile.parts().values())
            elif isinstance(piece.data, QuantizedTensor) and tensor.transposed:
                if piece.start == 0:
                    assert isinstance(tensor.target, str)
                    turned = TransposedWriter.of(writer, tensor.name, tensor.shape, tensor.target)
                assert turned is not None
                rows = _dense_rows(piece, change)
                background.submit(turned.add, rows)
                size = rows.nbytes
            else:
                data, at = _dense(piece, change)
                background.submit(writer.write, tensor.name, data, at)
                size = len(data)
            progress.advance(size, finished=piece.last)
    return outcomes


def _read_change(reader: TileReader, adapter: StoredAdapter, tensor: MergedTensor) -> _Change:
    moves = None
    if tensor.statistics is not None:
        moves = TensorMoves.read(reader, tensor.name, tensor.statistics)
    return _Change(read_delta(reader, adapter, tensor), moves)


def read_delta(reader: TileReader, adapter: StoredAdapter, tensor: MergedTensor) -> Delta | None:
    """What the adapter adds to the tensor of `tensor`; None for one that it leaves alone."""
    found = tensor.adapted
    if found is None:
        return None
    values = read_layer(reader, adapter.config, found.layer)
    return Delta.fold(values, found.layer.scaling, found.cols, found.block_size)


def _pieces(
    shard: PlannedShard[MergedTensor], reader: TileReader, options: MergeOptions
) -> Iterator[_Piece]:
    for tensor in shard.tensors:
        base = tensor.base
        if isinstance(base, StoredTensor):
            step = base.shape.tile_rows(options.tile_weights)
            for start in range(0, base.shape.rows, step):
                stop = min(base.shape.rows, start + step)
                tile = read_quantized(reader, base, start, stop)
                yield _Piece(tensor, start, tile, last=stop == base.shape.rows)
        elif tensor.adapted is not None or tensor.tokens is not None:
            rows, cols = tensor.shape
            step = max(1, options.tile_weights // max(1, cols))
            for start in range(0, rows, step):
                stop = min(rows, start + step)
                changed = _with_tokens(reader, tensor, start, reader.read_rows(base, start, stop))
                yield _Piece(tensor, start, changed, last=stop == rows)
        else:
            for start, data, last in copied(reader, tensor.saved or base):
                yield _Piece(tensor, start, data, last)


def _with_tokens(
    reader: TileReader, tensor: MergedTensor, start: int, rows: torch.Tensor
) -> torch.Tensor:
    """`rows` from `start` on, those that were trained alone in their place."""
    if tensor.tokens is None:
        return rows
    result = rows.double()
    trained = read_finite(reader, tensor.tokens.rows)
    for at, token in enumerate(tensor.tokens.indices):
        if start <= token < start + len(result):
            result[token - start] = trained[at]
    return result


def _dense(piece: _Piece, change: _Change) -> tuple[memoryview | bytes, int]:
    """Bytes to write for `piece` and where: changed in float64 and rounded once to the dtype."""
    if isinstance(piece.data, bytes):
        return _cast(piece, piece.data)
    result = _dense_rows(piece, change)
    return tensor_bytes(result), piece.start * result.shape[1] * result.element_size()


def _dense_rows(piece: _Piece, change: _Change) -> torch.Tensor:
    """Rows of a result: changed in float64 and rounded once to the dtype."""
    tensor, data = piece.tensor, piece.data
    assert isinstance(tensor.target, str)
    assert not isinstance(data, bytes)
    if isinstance(data, QuantizedTensor):
        moves, q = change.moves, data
        data = dequantize_tensor(q)
        if moves is not None:
            data = moves.change(q, piece.start).add_(data)
    stop, delta = piece.start + data.shape[0], change.delta
    exact = data if delta is None else delta.rows(piece.start, stop).add_(data)
    return narrow(exact, tensor.target, tensor.name)


def _cast(piece: _Piece, data: bytes) -> tuple[memoryview | bytes, int]:
    """Copied bytes as they are, or in another floating dtype."""
    tensor = piece.tensor
    source = tensor.saved or tensor.base
    assert isinstance(source, TensorInfo)
    assert isinstance(tensor.target, str)
    if data and tensor.saved is not None and source.dtype in FLOATS:
        values = torch.frombuffer(bytearray(data), dtype=torch_dtype(source.dtype))
        if not bool(values.isfinite().all()):
            raise IrqError(
                f"{source.shard.name}: {source.name} holds NaN or infinite numbers: training has "
                "failed; take an earlier checkpoint of the adapter"
            )
    return cast_bytes(data, piece.start, source.dtype, tensor.target, tensor.name)


def _requantized(
    q: QuantizedTensor,
    tensor: MergedTensor,
    start: int,
    change: _Change,
    settings: MergeSettings,
) -> tuple[QuantizedTensor, Outcome]:
    """The tile in the result's format, and what that did to it."""
    assert isinstance(tensor.target, ModuleFormat)
    assert isinstance(tensor.base, StoredTensor)
    base, delta = dequantize_tensor(q), change.delta
    idle = delta is None or (delta.is_zero and tensor.target == tensor.base.format)
    if idle and change.moves is None:
        return q, Outcome(sum_of_squares(base))
    if delta is None or delta.block_size is not None:
        return _restated(q, tensor, start, change, settings, base)
    assert tensor.again is not None
    added = delta.rows(start, start + base.shape[0])
    if change.moves is not None:
        added += change.moves.change(q, start)
    wanted = (added + base).to(torch.float32)
    tile, stats = quantize_with_stats(
        wanted, tensor.again, threads=settings.options.threads, name=f"{tensor.name} (merged)"
    )
    return tile, replace(measure_outcome(base, added, dequantize_tensor(tile)), stats=stats)


def _restated(
    q: QuantizedTensor,
    tensor: MergedTensor,
    start: int,
    change: _Change,
    settings: MergeSettings,
    base: torch.Tensor,
) -> tuple[QuantizedTensor, Outcome]:
    """The tile with its codes as they are: statistics moved in float64, and rounded once."""
    kind, tile = settings.options.stored, q
    of_tau = of_scale = None
    scale = expand_statistic(q.scale, q.scale_grid).double()
    tau = expand_statistic(q.tau, q.tau_grid).double()
    moves, delta = change.moves, change.delta
    if moves is not None:
        scale, tau = moves.statistics(q, start)
    if delta is not None:
        tau = tau + delta.block_rows(start, start + base.shape[0])
    if tensor.moves_tau:
        tile, of_tau = move_tau(tile, tau, kind, tensor.name)
    if tensor.moves_scale:
        tile, of_scale = move_scale(tile, scale, kind, tensor.name)
    seen = measure_outcome(base, restated_change(q, scale, tau), dequantize_tensor(tile))
    return tile, replace(seen, tau=of_tau, scale=of_scale)
