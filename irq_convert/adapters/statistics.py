"""Scale and tau of a packed layer as something that trains, its codes as they are.

    scale' = scale (1 + f)        tau' = tau + scale o        y = (level[code] scale' + tau') x

f and o, float32 `[rows, blocks]`, one of each a block, begin at 0 and are in units of the block's
own scale, so that one learning rate serves all of them. Several adapters add up. What they change
can be stored in the artifact itself (`merge --to irq`): nothing is left to compute then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import encode_statistic, expand_statistic
from irq_convert.errors import IrqError

SCALE, TAU = "lora_irq_scale", "lora_irq_tau"
"""What f and o of a layer are called in an adapter's file."""


class Moves(nn.Module):
    """f or o of one adapter, `weight` `[rows, blocks]`.

    A module, so that the parameter's name holds ".<adapter>." in its middle, as A's and B's do.
    """

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(like.shape, device=like.device))


def moved_statistics(
    q: QuantizedTensor,
    factors: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    rounded: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale' and tau' `[rows, blocks]`, computed in `dtype`, differentiable in f and o.

    `rounded` gives them the values that they will have when they are stored so; gradients pass
    through as if they had not been rounded.
    """
    scale = expand_statistic(q.scale, q.scale_grid).to(dtype)
    tau = expand_statistic(q.tau, q.tau_grid).to(dtype)
    if offsets:
        tau = tau + scale * _sum(offsets, dtype)
    if factors:
        scale = scale * (1 + _sum(factors, dtype))
    if rounded is not None:
        scale, tau = _stored(scale, rounded), _stored(tau, rounded)
    return scale, tau


def with_statistics(q: QuantizedTensor, scale: torch.Tensor, tau: torch.Tensor) -> QuantizedTensor:
    """`q` with floating statistics in place of its own."""
    return replace(q, scale=scale, tau=tau, scale_grid=None, tau_grid=None)


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


def _sum(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    first, *others = (part.to(dtype) for part in parts)
    for other in others:
        first = first + other
    return first


def _stored(values: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        step = expand_statistic(*encode_statistic(values, stored)).to(values.dtype) - values
    return values + step
