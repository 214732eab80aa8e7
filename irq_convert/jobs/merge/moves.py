"""Scale and tau of one tensor as an adapter of statistics has moved them, by tiles of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from irq_convert.adapters.statistics import require_scales
from irq_convert.artifact.adapter import read_finite
from irq_convert.artifact.adapter_statistics import StoredStatistics
from irq_convert.checkpoint.reader import TileReader
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.elastic import repeat_blocks
from irq_convert.core.moved import as_levels, moved_statistics
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic


@dataclass(frozen=True)
class TensorMoves:
    """f and o of a whole tensor, float64 `[rows, blocks]`, None for what stays (core/moved.py)."""

    name: str
    factor: torch.Tensor | None
    offset: torch.Tensor | None

    @classmethod
    def read(cls, reader: TileReader, name: str, stored: StoredStatistics) -> TensorMoves:
        """Read those of tensor `name`; raises `IrqError` where a number is not finite."""
        parts = (
            None if info is None else read_finite(reader, info)
            for info in (stored.scale, stored.tau)
        )
        return cls(name, *parts)

    def statistics(self, q: QuantizedTensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact scale' and tau', float64, of `q`, rows from `start` on.

        Raises `IrqError` where a scale came to be negative.
        """
        stop = start + q.codes.shape[0]
        factors, offsets = (
            [] if part is None else [part[start:stop]] for part in (self.factor, self.offset)
        )
        scale, tau = moved_statistics(q, factors, offsets, dtype=torch.float64)
        require_scales(scale, [self.name])
        return scale, tau

    def change(self, q: QuantizedTensor, start: int) -> torch.Tensor:
        """What they add to every weight of `q`, rows from `start` on, exact in float64."""
        scale, tau = self.statistics(q, start)
        return restated_change(q, scale, tau)


def restated_change(q: QuantizedTensor, scale: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """`level (scale' - scale) + tau' - tau` of every weight of `q`, float64 `[rows, cols]`."""
    by_scale = scale - expand_statistic(q.scale, q.scale_grid).double()
    change = repeat_blocks(tau - expand_statistic(q.tau, q.tau_grid).double(), q.cols, q.block_size)
    if bool(by_scale.any()):
        levels = dequantize_tensor(as_levels(q)).double()
        change = change + levels * repeat_blocks(by_scale, q.cols, q.block_size)
    return change
