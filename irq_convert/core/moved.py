"""Statistics of a matrix that were moved by training, its codes as they are.

    scale' = scale (1 + f)        tau' = tau + scale o

f and o, `[rows, blocks]`, are one number a block, in units of the block's own scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import encode_statistic, expand_statistic


def moved_statistics(
    q: QuantizedTensor,
    factors: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    rounded: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale' and tau' of `q` in `dtype`, differentiable in f and o; those of several adapters add.

    `rounded` gives them the values that they will have when they are stored so; gradients pass
    through as if they had not been rounded.
    """
    scale = expand_statistic(q.scale, q.scale_grid).to(dtype)
    tau = expand_statistic(q.tau, q.tau_grid).to(dtype)
    if offsets:
        tau = tau + scale * _sum(offsets, dtype)
    if factors:
        scale = scale * (1 + _sum(factors, dtype))
    if rounded is not None:  # what nothing has moved stays as it is stored
        scale = _stored(scale, rounded) if factors else scale
        tau = _stored(tau, rounded) if offsets else tau
    return scale, tau


def with_statistics(q: QuantizedTensor, scale: torch.Tensor, tau: torch.Tensor) -> QuantizedTensor:
    """`q` with floating statistics in place of its own."""
    return replace(q, scale=scale, tau=tau, scale_grid=None, tau_grid=None)


def as_levels(q: QuantizedTensor) -> QuantizedTensor:
    """`q` with scale 1 and tau 0, so that its dense values are the levels of its codes."""
    ones = torch.ones_like(q.scale, dtype=torch.float32)
    return with_statistics(q, ones, torch.zeros_like(ones))


def _sum(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    first, *others = (part.to(dtype) for part in parts)
    for other in others:
        first = first + other
    return first


def _stored(values: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        step = expand_statistic(*encode_statistic(values, stored)).to(values.dtype) - values
    return values + step
