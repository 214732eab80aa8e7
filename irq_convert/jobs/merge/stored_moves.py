"""Merging by moving statistics: an adapter changes tau, or scale too, of every block.

    level[code] * scale + tau + s (B'A')[row, block]  =  level[code] * scale + tau'

so codes stay as they are, bit for bit, and only the moved numbers have to be stored. What their
storing costs is measured for each way of storing them, whichever is chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import encode_statistic, expand_statistic
from irq_convert.core.statistic_dtypes import STATISTIC_DTYPES
from irq_convert.errors import IrqError
from irq_convert.jobs.merge.options import TauDtype


@dataclass(frozen=True)
class Cost:
    """Differences of a statistic as parts of its block's scale: largest, and sum of squares."""

    largest: float = 0.0
    squares: float = 0.0
    blocks: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            max(self.largest, other.largest),
            self.squares + other.squares,
            self.blocks + other.blocks,
        )

    @property
    def rms(self) -> float:
        """Root of the mean square over blocks."""
        return math.sqrt(self.squares / self.blocks) if self.blocks else 0.0

    def to_dict(self) -> dict[str, float | None]:
        """For JSON; None where the dtype cannot hold the statistic."""
        fits = math.isfinite(self.largest)
        return {"max": self.largest if fits else None, "rms": self.rms if fits else None}


def cost(difference: torch.Tensor, scale: torch.Tensor) -> Cost:
    """Of float64 differences and float32 scales of the same blocks; scales of 0 are left out."""
    live = scale > 0
    parts = (difference[live] / scale[live].double()).abs()
    if not parts.numel():
        return Cost()
    return Cost(float(parts.max()), float(parts.square().sum()), parts.numel())


@dataclass(frozen=True)
class MoveCosts:
    """How far a statistic moved, and what storing it as each dtype costs, as parts of the scale."""

    moved: Cost = Cost()
    stored: dict[TauDtype, Cost] = field(default_factory=lambda: dict.fromkeys(TauDtype, Cost()))

    def __add__(self, other: MoveCosts) -> MoveCosts:
        return MoveCosts(
            self.moved + other.moved,
            {kind: self.stored[kind] + other.stored[kind] for kind in TauDtype},
        )

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        stored = {kind.value: found.to_dict() for kind, found in self.stored.items()}
        return {"moved": self.moved.to_dict(), "stored": stored}


def move_tau(
    q: QuantizedTensor, exact: torch.Tensor, kind: TauDtype, name: str
) -> tuple[QuantizedTensor, MoveCosts]:
    """`q`, rows of tensor `name`, with tau `exact` (float64 `[rows, blocks]`) stored as `kind`.

    Raises `IrqError` when `kind` cannot hold it.
    """
    stored, grid, costs = _store(q, q.tau, q.tau_grid, exact, kind, f"{name}: its tau")
    return replace(q, tau=stored, tau_grid=grid), costs


def move_scale(
    q: QuantizedTensor, exact: torch.Tensor, kind: TauDtype, name: str
) -> tuple[QuantizedTensor, MoveCosts]:
    """The same of the scale, in parts of what it was."""
    stored, grid, costs = _store(q, q.scale, q.scale_grid, exact, kind, f"{name}: its scale")
    return replace(q, scale=stored, scale_grid=grid), costs


def _store(
    q: QuantizedTensor,
    before: torch.Tensor,
    before_grid: torch.Tensor | None,
    exact: torch.Tensor,
    kind: TauDtype,
    what: str,
) -> tuple[torch.Tensor, torch.Tensor | None, MoveCosts]:
    old = expand_statistic(before, before_grid).double()
    scale = expand_statistic(q.scale, q.scale_grid)
    costs: dict[TauDtype, Cost] = {}
    result: tuple[torch.Tensor, torch.Tensor | None] | None = None
    for each in TauDtype:
        try:
            stored, grid = encode_statistic(exact, STATISTIC_DTYPES[each.value].torch)
        except IrqError as error:
            if each != kind:  # its cost is of interest only
                costs[each] = Cost(math.inf, math.inf, 1)
                continue
            raise IrqError(
                f"{what} cannot be stored as {kind.value} ({error}): choose another --tau"
            ) from None
        costs[each] = cost(expand_statistic(stored, grid).double() - exact, scale)
        if each == kind:
            result = stored, grid
    assert result is not None
    return *result, MoveCosts(cost(exact - old, scale), costs)
