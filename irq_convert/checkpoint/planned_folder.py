"""A checkpoint folder that is going to be written: every file and every byte, before any is read.

Quantizing, merging and exporting differ in what becomes of a tensor; how tensors make shards,
which files are carried over, what the index says and how large everything is, stands here once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from irq_convert.checkpoint.files import copy_file_atomic, sha256_file, write_bytes_atomic
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.shards import INDEX_NAME, build_index, plan_shards, shard_name
from irq_convert.checkpoint.source import CONFIG_NAME, Checkpoint
from irq_convert.checkpoint.system import os_errors
from irq_convert.checkpoint.writer import TensorSpec, build_header

COPY_CHUNK = 4 << 20
METADATA = {"format": "pt"}
"""What transformers looks for in the header of a shard."""


class PlannedItem(Protocol):
    """A tensor of the source, by name, and what is stored for it."""

    @property
    def name(self) -> str: ...

    @property
    def outputs(self) -> Sequence[TensorSpec]: ...


T = TypeVar("T", bound=PlannedItem)


@dataclass(frozen=True)
class PlannedShard(Generic[T]):
    """One output file and the tensors whose parts it holds."""

    name: str
    tensors: tuple[T, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: METADATA)

    @property
    def outputs(self) -> list[TensorSpec]:
        """The stored tensors, in the order of the file."""
        return [spec for tensor in self.tensors for spec in tensor.outputs]

    @property
    def header(self) -> bytes:
        """The first bytes of the file, to the last one before the data."""
        return build_header(self.outputs, self.metadata)

    @cached_property
    def nbytes(self) -> int:
        """The exact size of the file."""
        return len(self.header) + sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True)
class PlannedFolder(Generic[T]):
    """All files of a result but its records.

    `carried` are copied unchanged from the folder `source`, `made` are files that it lacks, by
    name; `config` becomes config.json. JSON is
    written as transformers writes it, in ASCII, and with the Infinity that some configurations
    hold: strict JSON has none, but they mean it.
    """

    shards: tuple[PlannedShard[T], ...]
    source: Path
    carried: tuple[str, ...]
    config: Mapping[str, Any]
    made: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def tensors(self) -> list[T]:
        """In the order of the files."""
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(spec.nbytes for shard in self.shards for spec in shard.outputs)

    @property
    def index(self) -> dict[str, Any] | None:
        """Which file holds which tensor, where there is more than one."""
        if len(self.shards) == 1:
            return None
        weight_map = {spec.name: shard.name for shard in self.shards for spec in shard.outputs}
        return build_index(weight_map, self.nbytes)

    @property
    def documents(self) -> dict[str, bytes]:
        """config.json, the index and what is made, by name."""
        index = self.index
        found = {CONFIG_NAME: self.config} | ({INDEX_NAME: index} if index else {})
        texts = {name: f"{json.dumps(doc, indent=2)}\n".encode() for name, doc in found.items()}
        return {**self.made, **texts}

    @property
    def carried_sizes(self) -> dict[str, int]:
        """Bytes of the carried files; `IrqError` when one cannot be looked at."""
        with os_errors("look at its files", self.source):
            return {name: (self.source / name).stat().st_size for name in self.carried}

    @property
    def files(self) -> dict[str, int]:
        """The exact size of every file."""
        shards = {shard.name: shard.nbytes for shard in self.shards}
        documents = {name: len(text) for name, text in self.documents.items()}
        return shards | self.carried_sizes | documents

    @property
    def bytes_out(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())

    def write_rest(self, folder: Path) -> list[str]:
        """Write everything but the shards into `folder`; returns names. `IrqError` by the disk."""
        documents = self.documents
        for name in self.carried:
            copy_file_atomic(self.source / name, folder / name)
        for name, text in documents.items():
            write_bytes_atomic(folder / name, text)
        return [*self.carried, *documents]


def plan_folder(
    tensors: Sequence[T],
    max_shard_bytes: int,
    source: Checkpoint,
    config: Mapping[str, Any],
    *,
    replaced: Collection[str] = (),
    made: Mapping[str, bytes] | None = None,
    metadata: Mapping[str, str] = METADATA,
) -> PlannedFolder[T]:
    """Cut `tensors` into shards of at most `max_shard_bytes`; carry other files of `source` over.

    All but those in `replaced`, its config.json and its index. `made` are files beside them.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    sizes = [(tensor.name, sum(spec.nbytes for spec in tensor.outputs)) for tensor in tensors]
    parts = plan_shards(sizes, max_shard_bytes)
    shards = tuple(
        PlannedShard(
            shard_name(number, len(parts)), tuple(by_name[name] for name in names), metadata
        )
        for number, names in enumerate(parts, start=1)
    )
    made = made or {}
    gone = {CONFIG_NAME, INDEX_NAME, *replaced, *made}
    carried = tuple(name for name in source.other_files if name not in gone)
    return PlannedFolder(shards, source.folder, carried, config, made)


def copied(reader: TileReader, info: TensorInfo) -> Iterator[tuple[int, bytes, bool]]:
    """The bytes of a tensor in chunks: `(first byte, chunk, whether it is the last)`.

    An empty tensor gives one empty chunk. Chunks are copies: the reader uses its buffer again,
    and whoever writes may be a few chunks behind.
    """
    at = 0
    for chunk in reader.iter_bytes(info, COPY_CHUNK):
        at += len(chunk)
        yield at - len(chunk), bytes(chunk), at == info.nbytes
    if not info.nbytes:
        yield 0, b"", True


def checksums(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, as a manifest lists them; `IrqError` for an unreadable one."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in names
    }
