"""Files of importance: the mean square of each input column of the linear weights of a model.

The contract is formats/importance-v1.md. A file is small, is read whole, and is checked as it is
read: who has an `Importance` has finite numbers that are not negative.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irq_convert.artifact.manifest import SOURCE_KEYS
from irq_convert.checkpoint.header import TensorInfo, read_header
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.writer import ShardWriter, TensorSpec
from irq_convert.errors import IrqError
from irq_convert.version import PRODUCER

FORMAT, FORMAT_VERSION = "irq importance", "1"
_AGAIN = "measure again"


@dataclass(frozen=True)
class Importance:
    """`values` by the tensor's name in the files: float64 `[cols]`, or `[matrices, cols]`.

    `tokens` in windows of `window` were seen, of the text called `text`; `tokens_sha256` is a hash
    of their ids. `source` says of which model, as the manifest of an artifact does.
    """

    values: Mapping[str, np.ndarray]
    text: str
    tokens: int
    window: int
    tokens_sha256: str
    source: Mapping[str, Any]

    @property
    def metadata(self) -> dict[str, str]:
        """What the header of a file says, in its order."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "producer": PRODUCER,
            "text": self.text,
            "tokens": str(self.tokens),
            "window": str(self.window),
            "tokens_sha256": self.tokens_sha256,
            "source": json.dumps(dict(self.source), sort_keys=True),
        }

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors of a file, in its order."""
        return [TensorSpec(name, "F64", self.values[name].shape) for name in sorted(self.values)]


def check_squares(values: np.ndarray, name: str, where: Path | str) -> None:
    """Raise `IrqError` naming the tensor for numbers that are no mean squares."""
    if np.isfinite(values).all() and not (values < 0).any():
        return
    what = "negative numbers" if np.isfinite(values).all() else "NaN or infinite numbers"
    raise IrqError(f"{where}: {name} has {what}, which no mean squares are: {_AGAIN}")


def write_importance(path: Path, importance: Importance) -> int:
    """Write the file `path`, whole or not at all, and return its size.

    The same importance gives the same bytes. Raises `IrqError` for numbers that are no mean
    squares, and when the disk refuses.
    """
    for name, values in importance.values.items():
        check_squares(values, name, path)
    with ShardWriter(path, importance.specs, importance.metadata) as writer:
        for name, values in importance.values.items():
            writer.write(name, np.ascontiguousarray(values, "<f8").tobytes())
    return writer.nbytes


def is_importance(path: Path) -> bool:
    """Whether `path` is a file of this format, of any version."""
    try:
        return read_header(path).metadata.get("format") == FORMAT
    except IrqError:
        return False


def read_importance(path: Path) -> Importance:
    """Read and check the file `path`.

    Raises `IrqError` for a file that is not of this format, breaks a rule of it (naming the tensor
    or the key), or cannot be read.
    """
    header = read_header(path)
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise IrqError(
            f"{path}: no file of importance (its metadata have format "
            f"{metadata.get('format')!r}): give what `irq-convert measure` wrote, or an imatrix of "
            "llama.cpp"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise IrqError(
            f"{path}: of version {metadata.get('format_version')!r} of its format, and {PRODUCER} "
            f"reads version {FORMAT_VERSION}: update irq-convert, or {_AGAIN}"
        )
    if not header.tensors:
        raise IrqError(f"{path}: has no tensors: {_AGAIN}")
    with TileReader() as reader:
        values = {name: _values(reader, info) for name, info in sorted(header.tensors.items())}
    return Importance(
        values=values,
        text=metadata.get("text", ""),
        tokens=_count(path, metadata, "tokens"),
        window=_count(path, metadata, "window"),
        tokens_sha256=metadata.get("tokens_sha256", ""),
        source=_source(path, metadata),
    )


def _values(reader: TileReader, info: TensorInfo) -> np.ndarray:
    if info.dtype != "F64" or len(info.shape) not in (1, 2) or not info.numel:
        raise IrqError(
            f"{info.shard}: {info.name} is {info.dtype} {list(info.shape)}, and importance is F64 "
            f"[columns] or [matrices, columns]: {_AGAIN}"
        )
    values: np.ndarray = reader.read_tensor(info).numpy()
    check_squares(values, info.name, info.shard)
    return values


def _count(path: Path, metadata: Mapping[str, str], key: str) -> int:
    text = metadata.get(key, "")
    if not (text.isascii() and text.isdigit()):
        raise IrqError(f"{path}: {key} in its metadata is {text!r}, no count: {_AGAIN}")
    return int(text)


def _source(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get("source", ""))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(key in found for key in SOURCE_KEYS):
        raise IrqError(
            f"{path}: source in its metadata is no object with {', '.join(SOURCE_KEYS)}: {_AGAIN}"
        )
    return found
