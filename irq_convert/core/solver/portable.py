"""The sweep and the descent in whole-tensor operations, for tensors on any device.

The formulas of `kernels.sweep` and `kernels.descend`, over all rows at once. What columns do to
others goes through a panel at a time: within it one column after another, by `panel` functions that
may be kernels (`core.triton.sweep`, `core.triton.descend`) or those of this file; beyond it in one
product of matrices. Sums are added in another order than on the CPU, so now and then a weight that
lies between two levels takes the other one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from irq_convert.core.portable.grid import Grid
from irq_convert.core.solver.moments import Factor, full_precision

PANEL = 64
"""Columns of the sweep that feed back to each other before the product that tells the others."""


@dataclass(frozen=True)
class Book:
    """A codebook on the device: float32 levels and the midpoints between them."""

    block_size: int
    levels: torch.Tensor
    mids: torch.Tensor

    def values(self, codes: torch.Tensor, scale: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """`level[code] * scale + tau`."""
        return self.levels[codes.long()] * scale + tau

    def codes(self, value: torch.Tensor, scale: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """`#{k : w >= tau + m_k * scale}`, uint8, the rule of the format."""
        edges = tau[..., None] + self.mids * scale[..., None]
        return (value[..., None] >= edges).sum(-1).to(torch.uint8)


def sweep_panel(
    weight: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    feedback: torch.Tensor,
    book: Book,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, uint8, and `w - q` of a panel's columns, `[rows, width]` in the order of the sweep.

    `value`: the weights with what earlier panels add to them. `feedback`: `[width, width]`, the
    panel's own part of V transposed. The rest is float32 `[rows, width]`.
    """
    value, width = value.clone(), weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    wrong = torch.empty_like(weight)
    for j in range(width):
        codes[:, j] = book.codes(value[:, j], scale[:, j], tau[:, j])
        wrong[:, j] = weight[:, j] - book.values(codes[:, j], scale[:, j], tau[:, j])
        value[:, j + 1 :] += wrong[:, j : j + 1] * feedback[j + 1 :, j]
    return codes, wrong


def descend_panel(
    value: torch.Tensor,
    gain: torch.Tensor,
    moments: torch.Tensor,
    inverse: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    book: Book,
) -> torch.Tensor:
    """Codes, uint8 `[rows, width]`, after one pass over those of a block.

    `value` and `gain`, `[rows, width]`: what is stored, and what is left to gain. `moments`,
    `[width, width]`: the block's own part of H, and `inverse` one over its diagonal. `scale` and
    `tau`: `[rows]`.
    """
    gain = gain.clone()
    codes = torch.empty(value.shape, dtype=torch.uint8, device=value.device)
    for j in range(value.shape[1]):
        codes[:, j] = book.codes(value[:, j] + gain[:, j] * inverse[j], scale, tau)
        moved = book.values(codes[:, j], scale, tau) - value[:, j]
        gain -= moved[:, None] * moments[j]
    return codes


def sweep_rows(
    target: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    factor: Factor,
    book: Book,
    codes: torch.Tensor,
    panel: Callable[..., tuple[torch.Tensor, torch.Tensor]] = sweep_panel,
) -> None:
    """Codes, uint8 `[rows, cols]`, of `target`, float32 `[rows, cols]`, into `codes`.

    `scale` and `tau`: float32 `[rows, blocks_per_row]`, as decoded.
    """
    cols = target.shape[1]
    wrong = torch.empty_like(target)
    with full_precision():
        for start in range(0, cols, PANEL):
            stop = min(cols, start + PANEL)
            at = factor.order[start:stop]
            block = at // book.block_size
            weight = target[:, at]
            back = factor.feedback[start:stop]
            value = torch.addmm(weight, wrong[:, :start], back[:, :start].T) if start else weight
            found, left = panel(
                weight, value, scale[:, block], tau[:, block], back[:, start:stop], book
            )
            codes[:, at], wrong[:, start:stop] = found, left


def descend_rows(
    target: torch.Tensor,
    moments: torch.Tensor,
    book: Book,
    rounds: int,
    grids: torch.Tensor,
    zeros: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    codes: torch.Tensor,
    panel: Callable[..., torch.Tensor] = descend_panel,
) -> None:
    """Improve `scale`, `tau` (float32 `[rows, blocks_per_row]`) and `codes` (uint8) in place.

    `target` float32 `[rows, cols]`; `moments` float32 `[cols, cols]`, symmetric. `grids`: float32
    `[rows, blocks_per_row, 6]`, step, offset and one over the step of scale, then of tau. `zeros`,
    int32 `[rows, blocks_per_row]`: the zero point that ties tau to the scale, or -1.
    """
    size, cols = book.block_size, target.shape[1]
    inverse = 1.0 / moments.diagonal()
    block_of = torch.arange(cols, device=target.device) // size
    with full_precision():
        value = book.values(codes, scale[:, block_of], tau[:, block_of])
        gain = (target - value) @ moments
        for _ in range(rounds):
            for at in range(scale.shape[1]):
                part = slice(at * size, min(cols, at * size + size))
                inside, before = moments[part, part], value[:, part].clone()
                own = book.levels[codes[:, part].long()]
                pair = refit(
                    own, gain[:, part], inside, (scale[:, at], tau[:, at]), grids[:, at],
                    zeros[:, at], book.levels,
                )  # fmt: skip
                scale[:, at], tau[:, at] = pair
                s, t = pair[0][:, None], pair[1][:, None]
                fitted = own * s + t
                left = gain[:, part] - (fitted - before) @ inside
                found = panel(fitted, left, inside, inverse[part], *pair, book)
                codes[:, part] = found
                value[:, part] = book.values(found, s, t)
                gain.addmm_(value[:, part] - before, moments[part], alpha=-1.0)


def refit(
    own: torch.Tensor,
    gain: torch.Tensor,
    moments: torch.Tensor,
    pair: tuple[torch.Tensor, torch.Tensor],
    grids: torch.Tensor,
    zeros: torch.Tensor,
    levels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and tau of a block, `[rows]`: the storable pair by least squares, where it gains.

    `own`: the levels of its codes, `[rows, width]`. The rest is as in `descend_rows`, for a block.
    """
    scale, tau = pair
    ll, lo = (own * (own @ moments)).sum(1), own @ moments.sum(1)
    oo = moments.sum()
    gl, go = (own * gain).sum(1), gain.sum(1)
    tied, level = zeros >= 0, levels[zeros.clamp_min(0).long()]
    bottom = ll - level * (2.0 * lo - level * oo)
    det = ll * oo - lo * lo
    usable = torch.where(tied, bottom > 0, det > 1e-6 * ll * oo)
    one = torch.ones_like(det)
    bottom, det = torch.where(bottom > 0, bottom, one), torch.where(usable, det, one)
    wanted = scale + torch.where(tied, (gl - level * go) / bottom, (gl * oo - go * lo) / det)
    of_scale, of_tau = (
        Grid(grids[:, i], grids[:, i + 1], grids[:, i + 2]) for i in (0, 3)
    )  # fmt: skip
    new_scale = of_scale.decode(of_scale.encode(wanted))
    free = of_tau.decode(of_tau.encode(tau + (ll * go - lo * gl) / det))
    new_tau = torch.where(tied, 0.0 - level * new_scale, free)
    ds, dt = new_scale - scale, new_tau - tau
    better = 2.0 * (ds * gl + dt * go) - ds * ds * ll - 2.0 * ds * dt * lo - dt * dt * oo
    took = usable & (new_scale > 0) & (better > 0)
    return torch.where(took, new_scale, scale), torch.where(took, new_tau, tau)
