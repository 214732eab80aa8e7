"""How much the columns of each tensor count by a file, whichever program has written it.

`irq-convert measure` calls tensors by their names in the checkpoint, llama.cpp by its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irq_convert.artifact.imatrix import Imatrix, read_imatrix
from irq_convert.artifact.importance import FORMAT, Importance, read_importance
from irq_convert.checkpoint.files import sha256_file
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.checkpoint.system import expand_home, os_errors
from irq_convert.errors import UsageError
from irq_convert.hf.llama_cpp_names import LlamaCppNames

IMATRIX = "imatrix"
MEASURE = "measure this model (irq-convert measure)"


@dataclass(frozen=True)
class ImportanceFile:
    """A file as it was read; `record` is the manifest's `importance`."""

    path: Path
    found: Importance | Imatrix
    record: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Of the file."""
        return str(self.record["sha256"])


def matrices_of(shape: Sequence[int]) -> int:
    """How many matrices a tensor of `shape` is: those of experts lie in one of three dimensions."""
    return shape[0] if len(shape) == 3 else 1


def read_importance_file(path: Path) -> ImportanceFile:
    """Read and check a file of `measure` or of llama.cpp.

    Raises `UsageError` where there is no such file, and `IrqError` for one that is damaged or
    neither, naming the tensor where it is one.
    """
    path = expand_home(path)
    with os_errors("look at it", path):
        if not path.is_file():
            what = "a folder, not a file" if path.is_dir() else "no such file"
            raise UsageError(f"--importance {path}: {what}; give what `irq-convert measure` wrote")
    with os_errors("read it", path), path.open("rb") as file:
        start = file.read(9)
    # A header of safetensors is an object, after eight bytes of its length.
    found: Importance | Imatrix = read_importance(path) if start[8:] == b"{" else read_imatrix(path)
    record = {
        "kind": FORMAT if isinstance(found, Importance) else IMATRIX,
        "file": path.name,
        "sha256": sha256_file(path),
        "text": found.text or None,
        "tokens": found.tokens,
    }
    return ImportanceFile(path, found, record)


class _Misfit(Exception):
    """What a file has of a tensor, where it is of another shape."""


class ColumnValues:
    """What a file says of the tensors of a checkpoint, by the checkpoint's names.

    Raises `UsageError` for an imatrix of an architecture whose names are not known, and where the
    package gguf is missing.
    """

    def __init__(self, file: ImportanceFile, checkpoint: Checkpoint) -> None:
        self._path, self._found = file.path, file.found
        self._used: set[str] = set()
        self._names: LlamaCppNames | None = None
        self._experts: dict[str, int] = {}
        if isinstance(file.found, Imatrix):
            self._names = LlamaCppNames(checkpoint.config, checkpoint.tensors)
            self._experts = _experts(self._names, checkpoint)

    def find(self, name: str, shape: Sequence[int], cols: int) -> np.ndarray | None:
        """Of the tensor `name` of `shape`, whose matrices have `cols` columns.

        float64 `[matrices, cols]`; None where the file has nothing of it. Raises `UsageError` where
        it has another shape.
        """
        matrices = matrices_of(shape)
        try:
            if isinstance(self._found, Importance):
                wanted = [matrices, cols] if len(shape) == 3 else [cols]
                return self._of_importance(self._found, name, wanted, matrices)
            return self._of_imatrix(self._found, name, matrices, cols)
        except _Misfit as misfit:
            raise UsageError(
                f"{self._path}: {name} {list(shape)} has importance {misfit}: the file is of "
                f"another model: {MEASURE}"
            ) from None

    @property
    def unused(self) -> set[str]:
        """Names in the file that no `find` has come upon."""
        return set(self._found.values) - self._used

    def _of_importance(
        self, found: Importance, name: str, shape: list[int], matrices: int
    ) -> np.ndarray | None:
        own = found.values.get(name)
        if own is None:
            return None
        self._used.add(name)
        if list(own.shape) != shape:
            raise _Misfit(f"{list(own.shape)}, not {shape}")
        return own.reshape(matrices, -1)

    def _of_imatrix(self, found: Imatrix, name: str, matrices: int, cols: int) -> np.ndarray | None:
        assert self._names is not None
        called = self._names.find(name)
        first = next((n for n in called.names if n in found.values), None) if called else None
        if called is None or first is None:
            return None
        self._used.update(called.names)
        count = matrices if called.expert is None else self._experts[called.names[0]]
        own = found.matrices(first, (count, cols))
        if own is None:
            raise _Misfit(f"{found.values[first].size} numbers as {first}, not {count} x {cols}")
        return own if called.expert is None else own[called.expert][None]


def _experts(names: LlamaCppNames, checkpoint: Checkpoint) -> dict[str, int]:
    """How many experts the source has a tensor each of, by their name together."""
    found: dict[str, int] = {}
    for tensor in checkpoint.tensors:
        called = names.find(tensor)
        if called is not None and called.expert is not None:
            found[called.names[0]] = max(found.get(called.names[0], 0), called.expert + 1)
    return found
