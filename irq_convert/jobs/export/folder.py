"""Checkpoints in safetensors files: planned from headers, written as a stream of tiles.

Targets whose result is a Hugging Face folder say how each quantized tensor is encoded; everything
else is copied, or cast where another dtype is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Any

from irq_convert.artifact.contents import Artifact, read_quantized
from irq_convert.artifact.dense import dense_config, dense_tensors
from irq_convert.artifact.dense_dtype import Dtype
from irq_convert.artifact.results import MARKS
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.buffers import tensor_bytes
from irq_convert.checkpoint.cast import cast_bytes
from irq_convert.checkpoint.columns import TransposedWriter
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.planned_folder import (
    METADATA,
    PlannedFolder,
    PlannedShard,
    copied,
    plan_folder,
)
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.writer import ShardWriter, TensorSpec
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.jobs.common.streams import BackgroundWriter, prefetched
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.export.target import Difference
from irq_convert.jobs.export.tiles import Encoder, difference
from irq_convert.progress import Progress


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of the source: encoded, or copied in `dtype` where `encoder` is None."""

    source: StoredTensor | TensorInfo
    encoder: Encoder | None
    dtype: str

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        if self.encoder is not None:
            return self.encoder.outputs()
        assert isinstance(self.source, TensorInfo)
        return (TensorSpec(self.source.name, self.dtype, self.source.shape),)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)


def plan_export_folder(
    artifact: Artifact,
    options: ExportOptions,
    encoder: Callable[[StoredTensor, str], Encoder],
    config: Callable[[dict[str, Any]], dict[str, Any]],
    metadata: Mapping[str, str] = METADATA,
) -> PlannedFolder[ExportedTensor]:
    """Lay out the folder.

    `encoder` is given each quantized tensor and the dtype it would have when dense; `config` turns
    the dense model's config.json into the target's. `metadata` is that of every shard.
    """
    dtype = Dtype(options.dtype)
    tensors = [
        ExportedTensor(
            found.base,
            encoder(found.base, found.dtype) if isinstance(found.base, StoredTensor) else None,
            found.dtype,
        )
        for found in dense_tensors(artifact, dtype)
    ]
    return plan_folder(
        tensors,
        options.max_shard_bytes,
        artifact.checkpoint,
        config(dense_config(artifact, dtype)),
        replaced=MARKS,
        metadata=metadata,
    )


def write_export_folder(
    plan: PlannedFolder[ExportedTensor], folder: Path, options: ExportOptions, progress: Progress
) -> list[Difference]:
    """Write everything into `folder`; returns what was measured on every quantized tensor.

    Raises `IrqError`, naming the tensor, when something cannot be read, represented or written.
    """
    progress.phase("exporting", len(plan.tensors), plan.nbytes)
    found: dict[str, Difference] = {}
    for shard in plan.shards:
        for seen in _write_shard(shard, folder, options, progress):
            found[seen.name] = found[seen.name] + seen if seen.name in found else seen
    plan.write_rest(folder)
    return list(found.values())


@dataclass(frozen=True)
class _Tile:
    """Rows from `start` on, or plain bytes from byte `start` on."""

    tensor: ExportedTensor
    start: int
    data: QuantizedTensor | bytes
    last: bool


def _write_shard(
    shard: PlannedShard[ExportedTensor],
    folder: Path,
    options: ExportOptions,
    progress: Progress,
) -> Iterator[Difference]:
    with (
        ShardWriter(folder / shard.name, shard.outputs, shard.metadata) as writer,
        BackgroundWriter() as background,
        TileReader() as reader,
        prefetched(_tiles(shard, reader, options)) as tiles,
    ):
        turned: TransposedWriter | None = None
        for tile in tiles:
            tensor = tile.tensor
            if isinstance(tile.data, bytes):
                source = tensor.source
                assert isinstance(source, TensorInfo)
                cast = cast_bytes(tile.data, tile.start, source.dtype, tensor.dtype, source.name)
                background.submit(writer.write, tensor.name, *cast)
                progress.advance(len(cast[0]), finished=tile.last)
                continue
            assert tensor.encoder is not None
            dense = dequantize_tensor(tile.data)
            encoded = tensor.encoder.encode(tile.data, dense, tile.start)
            if tensor.encoder.turned and not tile.start:
                shape, dtype = tensor.encoder.tensor.source_shape, tensor.dtype
                turned = TransposedWriter.of(writer, tensor.name, shape, dtype)
            for piece in encoded.pieces:
                if tensor.encoder.turned and turned is not None:
                    background.submit(turned.add, piece.data)
                else:
                    data = tensor_bytes(piece.data)
                    background.submit(writer.write, piece.name, data, piece.offset)
            yield difference(tensor.name, dense, encoded.values, encoded.changed_codes)
            size = sum(piece.data.nbytes for piece in encoded.pieces)
            progress.advance(size, finished=tile.last)


def tile_starts(
    tensor: StoredTensor, multiple: int, tile_weights: int
) -> Iterator[tuple[int, int]]:
    """Rows `(start, stop)` of tiles that `read_quantized` can read, on multiples of `multiple`."""
    shape = tensor.shape
    step = lcm(shape.row_multiple, multiple)
    step *= max(1, tile_weights // max(1, step * shape.cols))
    for start in range(0, shape.rows, step):
        yield start, min(shape.rows, start + step)


def _tiles(
    shard: PlannedShard[ExportedTensor], reader: TileReader, options: ExportOptions
) -> Iterator[_Tile]:
    for tensor in shard.tensors:
        source = tensor.source
        if isinstance(source, StoredTensor):
            assert tensor.encoder is not None
            multiple = tensor.encoder.row_multiple
            for start, stop in tile_starts(source, multiple, options.tile_weights):
                tile = read_quantized(reader, source, start, stop)
                yield _Tile(tensor, start, tile, last=stop == source.shape.rows)
            continue
        for start, data, last in copied(reader, source):
            yield _Tile(tensor, start, data, last)
