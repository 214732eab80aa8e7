"""The 8-bit second level in torch; `core.kernels.grid` is the same in scalars."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from irq_convert.core.blocks import GROUP_SIZE
from irq_convert.core.kernels.grid import ANCHOR_TRIES, FINEST, SPAN, TINY


@dataclass(frozen=True)
class Grid:
    """`step`, `offset` and `inverse`, float32 of any one shape: values `step * (code + offset)`."""

    step: torch.Tensor
    offset: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of_pairs(cls, pairs: torch.Tensor) -> Grid:
        """The twin of `pairs`: grids as the format stores them, `[groups, 2]`."""
        step, offset = pairs.unbind(1)
        return cls(step, offset, _inverse(step))

    def of_blocks(self, blocks: int) -> Grid:
        """One entry a block instead of one a group, as a column."""
        each = [t.repeat_interleave(GROUP_SIZE)[:blocks, None] for t in self._all()]
        return Grid(*each)

    def take(self, rows: torch.Tensor) -> Grid:
        """The entries of some blocks."""
        return Grid(*[t[rows] for t in self._all()])

    def pairs(self) -> torch.Tensor:
        """`[groups, 2]` as the format stores it."""
        return torch.stack([self.step, self.offset], 1)

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        """The nearest code, float32 from 0 to 255."""
        return (torch.round(value * self.inverse) - self.offset).clamp(0.0, 255.0)

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """`step * (code + offset)`."""
        return self.step * (code + self.offset)

    def window(self, center: torch.Tensor, radius: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """First and last code within `center +- radius`; the nearest if there is none."""
        first = torch.ceil((center - radius) * self.inverse - self.offset).clamp_min(0.0)
        last = torch.floor((center + radius) * self.inverse - self.offset).clamp_max(255.0)
        nearest = self.encode(center)
        empty = last < first
        return torch.where(empty, nearest, first), torch.where(empty, nearest, last)

    def _all(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.step, self.offset, self.inverse


def fit_grid(low: torch.Tensor, high: torch.Tensor, anchor: torch.Tensor) -> Grid:
    """A grid for each range `[low, high]`, float32 `[groups]`; see the kernel's `fit_grid`."""
    top = torch.maximum(low.abs(), high.abs())
    # A tensor, not a scalar: CUDA divides by scalars through their reciprocal.
    span = torch.full_like(top, float(SPAN))
    step = torch.maximum((high - low) / span, top * float(FINEST)).clamp_min(float(TINY))
    step = _through_anchor(step, anchor.abs())
    offset = torch.floor(low / step)
    same = low == high
    step = torch.where(same, low.abs(), step)
    offset = torch.where(same, torch.sign(low), offset)
    return Grid(step, offset, _inverse(step))


def _inverse(step: torch.Tensor) -> torch.Tensor:
    """`1 / step`, or 0 for step 0."""
    return torch.where(step > 0, torch.ones_like(step) / step, torch.zeros_like(step))


def _through_anchor(step: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    parts = torch.floor(anchor / step)
    done = anchor == 0
    for _ in range(ANCHOR_TRIES):
        trial = anchor / parts
        hit = ~done & (parts >= 1) & (trial * parts == anchor) & (trial >= step)
        step = torch.where(hit, trial, step)
        done = done | hit
        parts = parts - 1
    return step
