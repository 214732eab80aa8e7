"""Files of llama.cpp's `imatrix`, in both of their forms: mean squares by its names of tensors.

The older form is a list of names and float32 values, sums that are scaled so that the mean is
`value / calls`. The newer is GGUF with sums and counts for each tensor. Neither says which model it
is of, nor, in the older form, how many experts a tensor has.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from irq_convert.artifact.importance import check_squares
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError, UsageError, one_line

GGUF_MAGIC = b"GGUF"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME, _MOST_ENTRIES = 1024, 1 << 20
_DAMAGED = "download it again, or make it anew"


@dataclass(frozen=True)
class Imatrix:
    """`values` by llama.cpp's name: float64, in the older form of all matrices in one row.

    `text` is the name of what was read, "" where it is not known, `tokens` how many were, or None.
    """

    values: Mapping[str, np.ndarray]
    text: str
    tokens: int | None

    def matrices(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The values of `name` as `shape`, `[matrices, cols]`; None where they are not as many."""
        found = self.values[name]
        return found.reshape(shape) if found.size == np.prod(shape) else None


def read_imatrix(path: Path) -> Imatrix:
    """Read and check the file `path`, of either form.

    Raises `IrqError` for a file that is neither, ends early, or holds NaN or negative numbers
    (naming the tensor); `UsageError` where the package gguf is missing.
    """
    with os_errors("read it", path), path.open("rb") as file:
        start = file.read(len(GGUF_MAGIC))
    found = _read_gguf(path) if start == GGUF_MAGIC else _read_list(path)
    for name, values in found.values.items():
        check_squares(values, name, path)
    return found


def _read_list(path: Path) -> Imatrix:
    with os_errors("read it", path):
        data = path.read_bytes()
    cursor = _Cursor(path, data)
    entries = cursor.number()
    if not 0 < entries <= _MOST_ENTRIES:
        raise IrqError(
            f"{path}: neither a file of importance nor an imatrix of llama.cpp: give what "
            "`irq-convert measure` or `llama-imatrix` wrote"
        )
    values = {}
    for _ in range(entries):
        name = cursor.text()
        calls, count = cursor.number(), cursor.number()
        if calls < 0 or count <= 0:
            raise IrqError(f"{path}: {name}: {count} values of {calls} calls; {_DAMAGED}")
        sums = np.frombuffer(cursor.take(4 * count), "<f4").astype(np.float64)
        values[name] = sums / max(1, calls)
    if cursor.left < 8:
        return Imatrix(values, "", None)
    cursor.number()  # chunks, of a size that is not told
    return Imatrix(values, _name_only(cursor.text(empty=True)), None)


class _Cursor:
    """Walks through the bytes of a file in the older form."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._at = path, data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise IrqError(
                f"{self._path}: no importance, or an imatrix that ends early, at byte "
                f"{len(self._data)}: {_DAMAGED}"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self) -> int:
        found: int = struct.unpack("<i", self.take(4))[0]
        return found

    def text(self, empty: bool = False) -> str:
        length = self.number()
        if not (0 if empty else 1) <= length <= _LONGEST_NAME:
            raise IrqError(
                f"{self._path}: neither a file of importance nor an imatrix of llama.cpp (a name "
                f"of {length} bytes): give what `irq-convert measure` or `llama-imatrix` wrote"
            )
        return self.take(length).decode("utf-8", errors="replace")


def _read_gguf(path: Path) -> Imatrix:
    try:
        import gguf
    except ImportError:
        raise UsageError(
            f"{path}: reading it needs the package gguf: pip install 'irq-convert[gguf]'"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        told = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    except Exception as error:  # the package raises what numpy does
        raise IrqError(
            f"{path}: a GGUF file that is damaged ({one_line(error)}): {_DAMAGED}"
        ) from (error)
    if told.get("general.type") != "imatrix":
        raise IrqError(
            f"{path}: a GGUF file of type {told.get('general.type')!r}, no imatrix: give what "
            "`llama-imatrix` wrote"
        )
    values = {}
    for name in sorted(tensors):
        if name.endswith(_SUMS):
            base = name.removesuffix(_SUMS)
            found = _means(path, base, tensors[name], tensors.get(base + _COUNTS))
            if found is not None:
                values[base] = found
    if not values:
        raise IrqError(f"{path}: an imatrix without tensors: {_DAMAGED}")
    return Imatrix(values, _dataset(told), _tokens(told))


def _means(path: Path, name: str, sums: np.ndarray, counts: np.ndarray | None) -> np.ndarray | None:
    """Mean squares `[matrices, cols]`; a matrix that was given nothing has the mean of all.

    None where none was given anything.
    """
    if counts is None or sums.ndim != 2 or sums.dtype != np.float32:
        raise IrqError(f"{path}: {name} has no sums with their counts: {_DAMAGED}")
    wide = sums.astype(np.float64)
    times = counts.astype(np.float64).reshape(-1)
    if len(times) not in (1, len(wide)) or not np.isfinite(times).all() or (times < 0).any():
        raise IrqError(f"{path}: {name} has counts that are none: {_DAMAGED}")
    times = np.broadcast_to(times, len(wide))
    if not times.any():
        return None
    means: np.ndarray = wide / np.maximum(1, times)[:, None]
    means[times == 0] = wide.sum(0) / times.sum()
    return means


def _dataset(told: Mapping[str, Any]) -> str:
    names = told.get("imatrix.datasets")
    names = names if isinstance(names, list) else [names]
    return ", ".join(_name_only(str(name)) for name in names if name)


def _tokens(told: Mapping[str, Any]) -> int | None:
    count, size = (told.get(f"imatrix.chunk_{what}") for what in ("count", "size"))
    if not isinstance(count, int) or not isinstance(size, int):
        return None
    return count * size or None


def _name_only(path: str) -> str:
    """A file's name without the folders of whoever made the imatrix."""
    return PurePosixPath(PureWindowsPath(path).name).name
