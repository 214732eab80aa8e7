"""The header of a safetensors file: which tensors it holds, of what dtype and shape, and where.

Parsed with the standard library alone and checked completely, so that everything behind it may
trust offsets and shapes. Only the header is read, whatever the size of the file.

File layout: 8 bytes, little-endian u64 = N | N bytes of JSON, space padded | data of the tensors.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from irq_convert.checkpoint.json_files import DuplicateKeyError, unique_pairs
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element of every dtype that the safetensors format knows."""

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors library reads; longer ones are refused."""

_DAMAGED = "the file is damaged: download or save it again"
_LFS_POINTER = b"version https://git-lfs"


class PutTogether(Protocol):
    """What `checkpoint/lazy.py` makes, in the words that reading needs."""

    def files(self) -> list[Path]: ...

    def moved(self, place: Callable[[Path], Path]) -> PutTogether: ...

    def rows(self, reader: Any, info: TensorInfo, start: int, stop: int) -> Any: ...

    def columns(self, reader: Any, info: TensorInfo, matrix: int, start: int, stop: int) -> Any: ...


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: where it lies and what it is, without its data.

    `dtype` is the safetensors name ("BF16"), `offset` counts bytes from the start of the file
    `shard`, and `nbytes` is the exact length of its data there. Where `lazy` is set no file holds
    the tensor as it is: `lazy` puts it together (`checkpoint/lazy.py`), `shard` is its first file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    offset: int
    nbytes: int
    lazy: PutTogether | None = None

    @property
    def files(self) -> list[Path]:
        """Every file that is read for it."""
        return [self.shard] if self.lazy is None else self.lazy.files()

    def moved(self, place: Callable[[Path], Path]) -> TensorInfo:
        """The same tensor when its files lie where `place` says."""
        lazy = None if self.lazy is None else self.lazy.moved(place)
        return replace(self, shard=place(self.shard), lazy=lazy)

    @property
    def numel(self) -> int:
        """The number of elements; 1 for a scalar, 0 when a dimension is 0."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ShardHeader:
    """The parsed header of one file: its tensors in file order and its free-form metadata."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)


def matrix_shape(info: TensorInfo) -> tuple[int, int]:
    """Return the (rows, cols) that `TileReader.read_rows` sees, in elements.

    Rows are the first dimension and all others are flattened; a vector is one row, a scalar 1 x 1.
    """
    if len(info.shape) < 2:
        return 1, info.numel
    rows = info.shape[0]
    cols = 1
    for dim in info.shape[1:]:
        cols *= dim
    return rows, cols


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor of `dtype` and `shape` takes in a file.

    Raises `ValueError` for an unknown dtype, a negative dimension, or elements of under 8 bits
    that do not fill a whole number of bytes.
    """
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    if any(dim < 0 for dim in shape):
        raise ValueError(f"negative dimension in shape {list(shape)}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{dtype} of shape {list(shape)} does not fill a whole number of bytes")
    return bits // 8


def read_header(path: Path, file_size: int | None = None) -> ShardHeader:
    """Read and check the header of the safetensors file at `path`.

    `file_size` overrides the length of the file on disk; it is for a file that deliberately holds
    its header only (see `locate`), whose tensors then cannot be read.
    Raises `IrqError`, naming file and tensor, when the file cannot be read, is not safetensors, or
    breaks a rule of the format: header longer than 100 MB or than the file, duplicate keys, unknown
    dtype, bad shape, offsets that do not match, overlap, leave holes or do not end with the file.
    """
    with os_errors("read it", path):
        if not stat.S_ISREG(path.stat().st_mode):  # before open(): opening a pipe would block
            raise IrqError(f"{path}: not a regular file; a safetensors file is needed")
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            on_disk = os.fstat(fd).st_size
            start = os.pread(fd, 32, 0)
            length = _header_length(path, start, on_disk)
            raw = _pread_all(path, fd, length)
        finally:
            os.close(fd)
    return parse_header(path, raw, on_disk if file_size is None else file_size)


def header_length(path: Path, start: bytes) -> int:
    """Return the length N of the JSON from the first bytes of a file, or raise `IrqError`.

    `start` holds at least 8 bytes, or the whole file when that is shorter.
    """
    if start.startswith(_LFS_POINTER):
        raise IrqError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    if len(start) < 8:
        raise IrqError(f"{path}: shorter than the 8 bytes every safetensors file has; {_DAMAGED}")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise IrqError(
            f"{path}: claims a header of {length} bytes, over the limit of {MAX_HEADER_BYTES}; "
            "not a safetensors file, or damaged"
        )
    return length


def _header_length(path: Path, start: bytes, file_size: int) -> int:
    length = header_length(path, start)
    if length > file_size - 8:
        raise IrqError(
            f"{path}: claims a header of {length} bytes, but the file ends after {file_size}; "
            f"{_DAMAGED}"
        )
    return length


def _pread_all(path: Path, fd: int, length: int) -> bytes:
    parts, at = [], 8
    while at < 8 + length:
        part = os.pread(fd, 8 + length - at, at)
        if not part:
            raise IrqError(f"{path}: the header ends early at byte {at}; {_DAMAGED}")
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def parse_header(path: Path, raw: bytes, file_size: int) -> ShardHeader:
    """Check the header JSON `raw` of a file of `file_size` bytes; `path` is used for names only.

    Raises `IrqError` as `read_header` does.
    """
    entries = _load_json(path, raw)
    metadata = _metadata(path, entries.pop("__metadata__", None))
    data_start = 8 + len(raw)
    infos = [_tensor_info(path, name, entry, data_start) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.offset + info.nbytes))
    _check_cover(path, infos, data_start, file_size)
    return ShardHeader(path, {info.name: info for info in infos}, metadata)


def _load_json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_pairs)
    except DuplicateKeyError as error:
        raise IrqError(f"{path}: {error} in the header; {_DAMAGED}") from error
    except (ValueError, RecursionError) as error:
        raise IrqError(
            f"{path}: the header is not JSON; not a safetensors file, or damaged"
        ) from error
    if not isinstance(entries, dict):
        raise IrqError(
            f"{path}: the header is not a JSON object; not a safetensors file, or damaged"
        )
    return entries


def _metadata(path: Path, entry: Any) -> dict[str, str]:
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
        raise IrqError(f"{path}: __metadata__ in the header does not map text to text; {_DAMAGED}")
    return entry


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise IrqError(f"{where}: the name is not valid Unicode; {_DAMAGED}") from error
    if not isinstance(entry, dict):
        raise IrqError(f"{where}: its entry in the header is not an object; {_DAMAGED}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise IrqError(f"{where}: unknown dtype {dtype!r}; known are {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise IrqError(f"{where}: shape {shape!r} is not a list of sizes; {_DAMAGED}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise IrqError(f"{where}: data_offsets {offsets!r} are not two byte counts; {_DAMAGED}")
    try:
        nbytes = tensor_nbytes(dtype, tuple(shape))
    except ValueError as error:
        raise IrqError(f"{where}: {error}; {_DAMAGED}") from error
    begin, end = offsets
    if end - begin != nbytes:
        raise IrqError(
            f"{where}: data_offsets {offsets} hold {end - begin} bytes, "
            f"but {dtype} of shape {shape} takes {nbytes}; {_DAMAGED}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, nbytes)


def _check_cover(path: Path, infos: list[TensorInfo], data_start: int, file_size: int) -> None:
    """Refuse tensors (sorted by offset) that do not tile the data part of the file exactly."""
    cursor, previous = data_start, ""
    for info in infos:
        if info.offset < cursor:
            raise IrqError(
                f"{path}: tensors {previous!r} and {info.name!r} overlap at byte {info.offset}; "
                f"{_DAMAGED}"
            )
        if info.offset > cursor:
            raise IrqError(
                f"{path}: a hole of {info.offset - cursor} bytes before tensor {info.name!r}; "
                f"{_DAMAGED}"
            )
        cursor, previous = info.offset + info.nbytes, info.name
        if cursor > file_size:
            raise IrqError(
                f"{path}: truncated inside tensor {info.name!r}: the file has {file_size} bytes, "
                f"the header describes at least {cursor}; {_DAMAGED}"
            )
    if cursor < file_size:
        raise IrqError(
            f"{path}: {file_size - cursor} bytes after the last tensor belong to none; {_DAMAGED}"
        )
