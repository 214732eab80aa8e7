"""Moves of statistics and the packed tensors whose scale and tau they move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from irq_convert.artifact.adapter import StoredAdapter
from irq_convert.artifact.adapter_statistics import StoredStatistics
from irq_convert.artifact.contents import StoredTensor
from irq_convert.errors import IrqError
from irq_convert.hf.model_names import ModelNames
from irq_convert.jobs.merge.match_layers import Adapted, find_tensor


def match_statistics(
    adapter: StoredAdapter,
    layers: Mapping[str, Adapted],
    names: ModelNames,
    files: Mapping[str, Any],
) -> dict[str, StoredStatistics]:
    """The moves by tensor; `layers` are the adapter's low-rank layers by tensor.

    Raises `IrqError` for a tensor that is not packed or has other blocks, for two moves of one
    tensor, and for a packed layer that has matrices and lacks the moves that the settings have.
    """
    found: dict[str, StoredStatistics] = {}
    for moves in adapter.statistics.values():
        tensor = find_tensor(adapter, moves.weight, names, files)
        stored = files[tensor]
        shape = moves.parts[0].shape
        wanted = None
        if isinstance(stored, StoredTensor):
            wanted = (stored.shape.rows, stored.shape.blocks_per_row)
        if shape != wanted:
            has = "is not packed" if wanted is None else f"has statistics {list(wanted)}"
            raise IrqError(
                f"{adapter.folder}: moves statistics {list(shape)} of {moves.weight}, but {tensor} "
                f"{has}: it belongs to another artifact"
            )
        if tensor in found:
            raise IrqError(f"{adapter.folder}: {tensor} has its statistics moved twice: damaged")
        found[tensor] = moves
    for tensor in layers if adapter.config.statistics is not None else ():
        if isinstance(files[tensor], StoredTensor) and tensor not in found:
            raise IrqError(
                f"{adapter.folder}: the settings train statistics, and {tensor} has none in the "
                "file: the adapter is incomplete: save or download it again"
            )
    return found
