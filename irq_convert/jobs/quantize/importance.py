"""How much the columns of each tensor count, from a file: found, checked, and handed out as shares.

The file is read before the source is opened, and laid beside the plan before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from irq_convert.artifact.imatrix import Imatrix, read_imatrix
from irq_convert.artifact.importance import FORMAT, Importance, read_importance
from irq_convert.artifact.manifest import fingerprint
from irq_convert.checkpoint.files import sha256_file
from irq_convert.checkpoint.system import os_errors
from irq_convert.core.importance import Shares, column_shares
from irq_convert.errors import UsageError
from irq_convert.hf.llama_cpp_names import LlamaCppNames
from irq_convert.jobs.quantize.plan import QuantizePlan, TensorPlan
from irq_convert.progress import Progress

IMATRIX = "imatrix"
_MEASURE = "measure this model (irq-convert measure)"


@dataclass(frozen=True)
class ImportanceFile:
    """A file as it was read; `record` is the manifest's `importance`."""

    path: Path
    found: Importance | Imatrix
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Weighing:
    """What the inputs of each quantized tensor are worth, float64 `[matrices, cols]` by name.

    Columns of embeddings and heads that the file does not have are worth the same.
    """

    values: Mapping[str, np.ndarray]
    record: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    @property
    def of_data(self) -> dict[str, Any]:
        """What tells a run with this file from one with another."""
        return {"importance": self.record["sha256"]}

    def shares(self, tensor: TensorPlan) -> Shares:
        """Of all rows of `tensor`, which has as many matrices as its values."""
        assert tensor.spec is not None
        values = self.values[tensor.name]
        rows = tensor.shape.rows // len(values)
        return column_shares(values, rows, tensor.spec.block_size, tensor.name)


def read_importance_file(path: Path | None) -> ImportanceFile | None:
    """Read and check a file of `measure` or of llama.cpp; None for None.

    Raises `UsageError` where there is no such file, and `IrqError` for one that is damaged or
    neither, naming the tensor where it is one.
    """
    if path is None:
        return None
    path = path.expanduser()
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


def plan_importance(
    file: ImportanceFile | None, plan: QuantizePlan, progress: Progress
) -> Weighing | None:
    """Lay `file` beside the tensors that are quantized, and say what is odd; None for None.

    Raises `UsageError` naming the first tensor that the file lacks or has another shape of, and
    for an imatrix of an architecture whose names are not known.
    """
    if file is None:
        return None
    if isinstance(file.found, Imatrix):
        weighing = _of_imatrix(file, file.found, plan)
    else:
        weighing = _of_importance(file, file.found, plan)
    for note in weighing.notes:
        progress.note(note)
    return weighing


def _of_importance(file: ImportanceFile, found: Importance, plan: QuantizePlan) -> Weighing:
    values: dict[str, np.ndarray] = {}
    missing = []
    for tensor in plan.quantized:
        own = found.values.get(tensor.name)
        if own is None and tensor.name in plan.tables:
            values[tensor.name] = np.ones(_wanted(tensor))
            continue
        if own is None:
            missing.append(tensor.name)
            continue
        matrices, cols = _wanted(tensor)
        stack = len(tensor.info.shape) == 3
        if own.shape != ((matrices, cols) if stack else (cols,)):
            wanted = f"[{matrices}, {cols}]" if stack else f"[{cols}]"
            raise UsageError(_misfit(file, tensor, f"{list(own.shape)}, not {wanted}"))
        values[tensor.name] = own.reshape(matrices, cols)
    _refuse_missing(file, missing, len(plan.quantized))
    notes = list(_extra(file, set(found.values) - set(values), plan))
    ours = fingerprint(plan.checkpoint.tensors.values())
    if found.source["tensors_sha256"] != ours:
        notes.append(
            f"{file.path}: measured on {found.source['model']}, whose files are not those of this "
            "model; all names and shapes fit"
        )
    return Weighing(values, file.record, tuple(notes))


def _of_imatrix(file: ImportanceFile, found: Imatrix, plan: QuantizePlan) -> Weighing:
    names = LlamaCppNames(plan.checkpoint.config, plan.checkpoint.tensors)
    values: dict[str, np.ndarray] = {}
    missing: list[str] = []
    used: set[str] = set()
    experts = _experts(names, plan)
    for tensor in plan.quantized:
        called = names.find(tensor.name)
        first = (
            next((name for name in called.names if name in found.values), None) if called else None
        )
        if first is None and tensor.name in plan.tables:
            values[tensor.name] = np.ones(_wanted(tensor))
            continue
        if called is None or first is None:
            missing.append(tensor.name)
            continue
        used.update(called.names)
        matrices, cols = _wanted(tensor)
        count = matrices if called.expert is None else experts[called.names[0]]
        own = found.matrices(first, (count, cols))
        if own is None:
            has = f"{found.values[first].size} numbers as {first}, not {count} x {cols}"
            raise UsageError(_misfit(file, tensor, has))
        values[tensor.name] = own if called.expert is None else own[called.expert][None]
    _refuse_missing(file, missing, len(plan.quantized))
    extra = {name for name in found.values if name not in used}
    return Weighing(values, file.record, tuple(_extra(file, extra, plan)))


def _experts(names: LlamaCppNames, plan: QuantizePlan) -> dict[str, int]:
    """How many experts the source has a tensor each of, by their name together."""
    found: dict[str, int] = {}
    for tensor in plan.checkpoint.tensors:
        called = names.find(tensor)
        if called is not None and called.expert is not None:
            found[called.names[0]] = max(found.get(called.names[0], 0), called.expert + 1)
    return found


def _wanted(tensor: TensorPlan) -> tuple[int, int]:
    """Matrices and columns of a tensor."""
    shape = tensor.info.shape
    return (shape[0] if len(shape) == 3 else 1), tensor.shape.cols


def _misfit(file: ImportanceFile, tensor: TensorPlan, what: str) -> str:
    return (
        f"{file.path}: {tensor.name} {list(tensor.info.shape)} has importance {what}: the file is "
        f"of another model: {_MEASURE}"
    )


def _refuse_missing(file: ImportanceFile, missing: list[str], every: int) -> None:
    if missing:
        raise UsageError(
            f"{file.path}: lacks {len(missing)} of the {every} weights to quantize, the first is "
            f"{missing[0]}: {_MEASURE}, or keep them as they are (--keep)"
        )


def _extra(file: ImportanceFile, names: set[str], plan: QuantizePlan) -> list[str]:
    """A note of what the file has beyond the plan, but for what the plan keeps."""
    foreign = sorted(names - set(plan.checkpoint.tensors))
    if not foreign or (isinstance(file.found, Imatrix) and foreign == ["output.weight"]):
        return []
    return [f"{file.path}: {len(foreign)} names in it are not used, the first is {foreign[0]}"]
