"""How much the columns of each tensor count, from a file: found, checked, and handed out as shares.

The file is read before the source is opened, and laid beside the plan before any weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from irq_convert.artifact.importance import Importance
from irq_convert.artifact.manifest import fingerprint
from irq_convert.core.importance import Shares, column_shares
from irq_convert.errors import UsageError
from irq_convert.jobs.calibration.importance_file import (
    MEASURE,
    ColumnValues,
    ImportanceFile,
    matrices_of,
    read_importance_file,
)
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import QuantizePlan, TensorPlan
from irq_convert.progress import Progress


@dataclass(frozen=True)
class Weighing:
    """What the inputs of each quantized tensor are worth, float64 `[matrices, cols]` by name.

    Columns of embeddings and heads that the file does not have are worth the same.
    """

    values: Mapping[str, np.ndarray]
    record: Mapping[str, Any]

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


def find_importance(options: QuantizeOptions) -> ImportanceFile | None:
    """The file that `options` names, read and checked as by `read_importance_file`."""
    return None if options.importance is None else read_importance_file(options.importance)


def plan_importance(
    file: ImportanceFile | None, plan: QuantizePlan, progress: Progress
) -> Weighing | None:
    """Lay `file` beside the tensors that are quantized, and say what is odd; None for None.

    Raises `UsageError` naming the first tensor that the file lacks or has another shape of, and
    for an imatrix of an architecture whose names are not known.
    """
    if file is None:
        return None
    values: dict[str, np.ndarray] = {}
    missing: list[str] = []
    columns = ColumnValues(file, plan.checkpoint)
    for tensor in plan.quantized:
        own = columns.find(tensor.name, tensor.info.shape, tensor.shape.cols)
        if own is not None:
            values[tensor.name] = own
        elif tensor.name in plan.tables:
            values[tensor.name] = np.ones((matrices_of(tensor.info.shape), tensor.shape.cols))
        else:
            missing.append(tensor.name)
    _refuse_missing(file, missing, len(plan.quantized))
    for note in _oddities(file, columns.unused, plan):
        progress.note(note)
    return Weighing(values, file.record)


def _refuse_missing(file: ImportanceFile, missing: list[str], every: int) -> None:
    if missing:
        raise UsageError(
            f"{file.path}: lacks {len(missing)} of the {every} weights to quantize, the first is "
            f"{missing[0]}: {MEASURE}, or keep them as they are (--keep)"
        )


def _oddities(file: ImportanceFile, unused: set[str], plan: QuantizePlan) -> Iterator[str]:
    """Notes of what the file has beyond the plan, but for what the plan keeps, and whose it is."""
    foreign = sorted(unused - set(plan.checkpoint.tensors))
    if foreign and (isinstance(file.found, Importance) or foreign != ["output.weight"]):
        yield f"{file.path}: {len(foreign)} names in it are not used, the first is {foreign[0]}"
    if not isinstance(file.found, Importance):
        return
    if file.found.source["tensors_sha256"] != fingerprint(plan.checkpoint.tensors.values()):
        yield (
            f"{file.path}: measured on {file.found.source['model']}, whose files are not those of "
            "this model; all names and shapes fit"
        )
