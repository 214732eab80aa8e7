"""What became of one quantized tensor that was merged into the same format: sums over its tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from irq_convert.core.tensor_stats import TensorStats
from irq_convert.jobs.merge.stored_moves import MoveCosts


@dataclass(frozen=True)
class Outcome:
    """Sums of squares in float64 over one tensor, or some tiles of it.

    `energy` of the exact merged weights, `error` of what is stored against them, `change` of what
    the adapter adds. `stats` is there when the tensor was quantized again, `tau` when tau moved and
    `scale` when scale did; all None for one that the adapter leaves alone.
    """

    energy: float
    error: float = 0.0
    change: float = 0.0
    stats: TensorStats | None = None
    tau: MoveCosts | None = None
    scale: MoveCosts | None = None

    def __add__(self, below: Outcome) -> Outcome:
        """Of two tiles of the same tensor, `below` following this one."""
        return Outcome(
            self.energy + below.energy,
            self.error + below.error,
            self.change + below.change,
            self.stats + below.stats if self.stats and below.stats else None,
            self.tau + below.tau if self.tau and below.tau else None,
            self.scale + below.scale if self.scale and below.scale else None,
        )

    @property
    def restated(self) -> bool:
        """Whether statistics moved and codes did not."""
        return self.tau is not None or self.scale is not None

    @property
    def relative_error(self) -> float:
        """Of what is stored, against the exact merged weights."""
        return self.error / self.energy if self.energy else 0.0

    @property
    def survived(self) -> float:
        """`1 - error / change`: 1 when all that was learned is there, 0 or less when none is."""
        return survival(self.error, self.change)


def survival(error: float, change: float) -> float:
    """`1 - error / change`; of a change of nothing, 1 where there is no error and else 0."""
    if not change:
        return 0.0 if error else 1.0
    return 1 - error / change


def measure_outcome(base: torch.Tensor, change: torch.Tensor, merged: torch.Tensor) -> Outcome:
    """Compare `merged` (float32) with `base + change` (float64), which is overwritten."""
    change_energy = sum_of_squares(change)
    exact = change.add_(base)
    energy = sum_of_squares(exact)
    return Outcome(energy, sum_of_squares(exact.sub_(merged)), change_energy)


def sum_of_squares(values: torch.Tensor) -> float:
    """In float64, and in one order whatever the number of threads, which torch's sums are not."""
    return float(np.square(values.numpy(), dtype=np.float64).sum())
