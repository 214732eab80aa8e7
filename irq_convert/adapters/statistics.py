"""Scale and tau of a packed layer as something that trains, its codes as they are.

    y = (level[code] scale (1 + f) + tau + scale o) x

f and o begin at 0; units of the block's own scale make one learning rate serve all blocks. What
they change can be stored in the artifact itself (`merge --to irq`): nothing is left to compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from irq_convert.core.moved import moved_statistics, with_statistics
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.errors import IrqError, UsageError


class Moves(nn.Module):
    """f or o of one adapter, `weight` float32 `[rows, blocks]`.

    A module, so that the parameter's name holds ".<adapter>." in its middle, as A's and B's do.
    """

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        zeros = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        self.weight = nn.Parameter(zeros)


class MovesStatistics:
    """Mixed into a layer of PEFT's that keeps moves of its base's statistics, by adapter."""

    lora_irq_scale: nn.ModuleDict
    lora_irq_tau: nn.ModuleDict
    active_adapters: Any
    disable_adapters: Any
    merged: Any

    def _moving(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that move statistics of this layer."""
        there = {*self.lora_irq_scale, *self.lora_irq_tau}
        return [name for name in names if name in there]

    def _moving_now(self, adapter_names: Sequence[str] | None) -> list[str]:
        """Adapters that move statistics in this call, `adapter_names` being those of each row.

        Raises `UsageError` where rows ask for one.
        """
        if self.disable_adapters or self.merged:
            return []
        found = self._moving(dict.fromkeys(adapter_names or self.active_adapters))
        if adapter_names is not None:
            refuse_mixed(found)
        return found

    def _moved_weight(
        self,
        q: QuantizedTensor,
        weight: str,
        names: Sequence[str],
        rounded: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> QuantizedTensor:
        """`q` as adapters `names` move it, whose moves of it are called `weight`."""
        factors, offsets = (
            [part[name].get_parameter(weight) for name in names if name in part]
            for part in (self.lora_irq_scale, self.lora_irq_tau)
        )
        return with_statistics(q, *moved_statistics(q, factors, offsets, rounded, dtype))


def refuse_mixed(moving: Sequence[str]) -> None:
    """Raise `UsageError` where adapters that move statistics are asked for row by row."""
    if moving:
        raise UsageError(
            f"{', '.join(moving)} trains statistics, which are the same for a whole batch: leave "
            "adapter_names out"
        )


def require_scales(scale: torch.Tensor, names: Iterable[str]) -> None:
    """Raise `IrqError` where training has driven a scale below 0."""
    if bool((scale < 0).any()):
        raise IrqError(
            f"{', '.join(names)}: training has driven a scale below 0: take an earlier checkpoint, "
            "or train with a lower learning rate"
        )


def require_finite(values: torch.Tensor, names: Iterable[str]) -> None:
    """Raise `IrqError` where merging `names` has given NaN or infinite numbers."""
    if not bool(values.isfinite().all()):
        raise IrqError(
            f"merging {', '.join(names)} gives NaN or infinite weights: the adapter is broken"
        )
