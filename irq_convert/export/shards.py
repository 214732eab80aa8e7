"""Checkpoints in safetensors files: planned from headers, written as a stream of tiles.

Targets whose result is a Hugging Face folder say how each quantized tensor is encoded; everything
else is copied, or cast where another dtype is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Any

from irq_convert.artifact.contents import Artifact, read_quantized
from irq_convert.artifact.dense import Dtype, dense_config, dense_tensors
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.buffers import tensor_bytes
from irq_convert.checkpoint.cast import cast_bytes
from irq_convert.checkpoint.files import copy_file_atomic, write_bytes_atomic
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.shards import INDEX_NAME, build_index, plan_shards, shard_name
from irq_convert.checkpoint.system import os_errors
from irq_convert.checkpoint.writer import ShardWriter, TensorSpec, build_header
from irq_convert.convert.streams import Behind, prefetched
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.export.options import ExportOptions
from irq_convert.export.target import Difference
from irq_convert.export.tiles import Encoder, difference
from irq_convert.jobs.progress import Progress

COPY_CHUNK = 4 << 20
CONFIG_NAME = "config.json"
REPLACED_FILES = (CONFIG_NAME, MANIFEST_NAME, INDEX_NAME, "irq_merge.json")


@dataclass(frozen=True)
class Item:
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


@dataclass(frozen=True)
class Shard:
    """One output file."""

    name: str
    items: tuple[Item, ...]

    @property
    def outputs(self) -> list[TensorSpec]:
        return [spec for item in self.items for spec in item.outputs]


@dataclass(frozen=True)
class FolderPlan:
    """A folder to write: shards, files copied as they are, documents by name.

    `metadata` is that of every shard.
    """

    artifact: Artifact
    shards: tuple[Shard, ...]
    carried: tuple[str, ...]
    documents: Mapping[str, bytes]
    metadata: Mapping[str, str]

    @property
    def items(self) -> list[Item]:
        return [item for shard in self.shards for item in shard.items]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(item.nbytes for item in self.items)

    @cached_property
    def files(self) -> dict[str, int]:
        """The exact size of every file."""
        sizes = {
            shard.name: len(build_header(shard.outputs, self.metadata))
            + sum(item.nbytes for item in shard.items)
            for shard in self.shards
        }
        return sizes | document_sizes(self.artifact, self.carried, self.documents)


def carried_files(artifact: Artifact) -> tuple[str, ...]:
    """Files of the artifact that are copied unchanged."""
    return tuple(n for n in artifact.checkpoint.other_files if n not in REPLACED_FILES)


def document_sizes(
    artifact: Artifact, carried: tuple[str, ...], documents: Mapping[str, bytes]
) -> dict[str, int]:
    """Bytes of copied files and of documents."""
    with os_errors("look at its files", artifact.folder):
        sizes = {name: (artifact.folder / name).stat().st_size for name in carried}
    return sizes | {name: len(text) for name, text in documents.items()}


def plan_folder(
    artifact: Artifact,
    options: ExportOptions,
    encoder: Callable[[StoredTensor, str], Encoder],
    config: Callable[[dict[str, Any]], dict[str, Any]],
    metadata: Mapping[str, str],
) -> FolderPlan:
    """Lay out the folder.

    `encoder` is given each quantized tensor and the dtype it would have when dense; `config` turns
    the dense model's config.json into the target's.
    """
    dtype = Dtype(options.dtype)
    items = [
        Item(t.base, encoder(t.base, t.dtype) if isinstance(t.base, StoredTensor) else None, t.dtype)
        for t in dense_tensors(artifact, dtype)
    ]
    by_name = {item.name: item for item in items}
    parts = plan_shards([(item.name, item.nbytes) for item in items], options.max_shard_bytes)
    shards = tuple(
        Shard(shard_name(number, len(parts)), tuple(by_name[name] for name in names))
        for number, names in enumerate(parts, start=1)
    )
    documents: dict[str, Any] = {CONFIG_NAME: config(dense_config(artifact, dtype))}
    if len(shards) > 1:
        weight_map = {spec.name: shard.name for shard in shards for spec in shard.outputs}
        documents[INDEX_NAME] = build_index(weight_map, sum(item.nbytes for item in items))
    texts = {name: f"{json.dumps(doc, indent=2)}\n".encode() for name, doc in documents.items()}
    return FolderPlan(artifact, shards, carried_files(artifact), texts, metadata)


def write_documents(
    artifact: Artifact, folder: Path, carried: tuple[str, ...], documents: Mapping[str, bytes]
) -> None:
    """Copy files beside the weights and write documents; `IrqError` when the disk refuses."""
    for name in carried:
        copy_file_atomic(artifact.folder / name, folder / name)
    for name, text in documents.items():
        write_bytes_atomic(folder / name, text)


def write_folder(
    plan: FolderPlan, folder: Path, options: ExportOptions, progress: Progress
) -> list[Difference]:
    """Write everything into `folder`; returns what was measured on every quantized tensor.

    Raises `IrqError`, naming the tensor, when something cannot be read, represented or written.
    """
    progress.phase("exporting", len(plan.items), plan.nbytes)
    found: dict[str, Difference] = {}
    for shard in plan.shards:
        for seen in _write_shard(shard, folder, plan.metadata, options, progress):
            found[seen.name] = found[seen.name] + seen if seen.name in found else seen
    write_documents(plan.artifact, folder, plan.carried, plan.documents)
    return list(found.values())


@dataclass(frozen=True)
class _Tile:
    """Rows from `start` on, or plain bytes from byte `start` on."""

    item: Item
    start: int
    data: QuantizedTensor | bytes
    last: bool


def _write_shard(
    shard: Shard,
    folder: Path,
    metadata: Mapping[str, str],
    options: ExportOptions,
    progress: Progress,
) -> Iterator[Difference]:
    with (
        ShardWriter(folder / shard.name, shard.outputs, metadata) as writer,
        Behind() as behind,
        TileReader() as reader,
        prefetched(_tiles(shard, reader, options)) as tiles,
    ):
        for tile in tiles:
            size = 0
            if isinstance(tile.data, bytes):
                source = tile.item.source
                assert isinstance(source, TensorInfo)
                cast = cast_bytes(tile.data, tile.start, source.dtype, tile.item.dtype, source.name)
                behind.submit(writer.write, tile.item.name, *cast)
                data = cast[0]
                size = len(data)
            else:
                assert tile.item.encoder is not None
                dense = dequantize_tensor(tile.data)
                encoded = tile.item.encoder.encode(tile.data, dense, tile.start)
                for piece in encoded.pieces:
                    data = tensor_bytes(piece.data)
                    behind.submit(writer.write, piece.name, data, piece.offset)
                    size += len(data)
                yield difference(tile.item.name, dense, encoded.values, encoded.changed_codes)
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


def _tiles(shard: Shard, reader: TileReader, options: ExportOptions) -> Iterator[_Tile]:
    for item in shard.items:
        if isinstance(item.source, StoredTensor):
            assert item.encoder is not None
            source, multiple = item.source, item.encoder.row_multiple
            for start, stop in tile_starts(source, multiple, options.tile_weights):
                tile = read_quantized(reader, source, start, stop)
                yield _Tile(item, start, tile, last=stop == source.shape.rows)
            continue
        at = 0
        for chunk in reader.iter_bytes(item.source, COPY_CHUNK):
            at += len(chunk)
            # The reader reuses its buffer, and the writer is behind.
            yield _Tile(item, at - len(chunk), bytes(chunk), last=at == item.source.nbytes)
        if not item.source.nbytes:
            yield _Tile(item, 0, b"", last=True)
