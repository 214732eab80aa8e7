"""Integer zero points: which blocks have one, and the nearest one for those that do not.

With uniform levels `level[q] = 2 q / (L - 1) - 1`, a block is `w = level[q] * scale + tau`. Its
zero point is integer when `tau = -level[zp] * scale` for some code `zp`; then

    w = (q - zp) * step        with step = 2 scale / (L - 1)

which is what formats with integer zero points store.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from irq_convert.core.codebook import get_codebook


@dataclass(frozen=True)
class ZeroPoints:
    """Of some groups, all `[rows, groups]`: `zero_point` uint8, `step` float64, `exact` bool.

    Where `exact` is False, `zero_point` is the nearest to that of the block. A block of scale 0,
    all of whose weights are `tau`, is exact with a step of `|tau|`; `constant` marks those, whose
    codes have to be `zero_point`, `zero_point + 1` or `zero_point - 1` by the sign of tau.
    """

    zero_point: torch.Tensor
    step: torch.Tensor
    exact: torch.Tensor
    constant: torch.Tensor


def zero_points(scale: torch.Tensor, tau: torch.Tensor, bits: int) -> ZeroPoints:
    """Zero points of groups with float32 `scale` and `tau`, `[rows, groups]`, uniform levels.

    Decided from the values: a group is exact when `tau` is the float32 nearest to
    `-float32(level[zp] * scale)`, bit for bit.
    """
    last = (1 << bits) - 1
    levels = torch.tensor(get_codebook(f"int{bits}").levels, dtype=torch.float32)
    wide = scale.double()
    nearest = (1 - tau.double() / wide) * (last / 2)  # NaN and infinite where scale is 0
    nearest = nearest.nan_to_num(0.0, 0.0, 0.0).round_().clamp_(0, last).to(torch.uint8)
    constant = scale == 0
    exact = (-(levels[nearest.int()] * scale) == tau) | constant
    zero_point = torch.where(constant, (tau < 0).to(torch.uint8), nearest)
    step = torch.where(constant, tau.double().abs(), wide * 2 / last)
    return ZeroPoints(zero_point, step, exact, constant)


def constant_codes(found: ZeroPoints, tau: torch.Tensor) -> torch.Tensor:
    """The code, uint8 `[rows, groups]`, that makes `(q - zp) * step` equal `tau`."""
    return found.zero_point + tau.sign().to(torch.int8).to(torch.uint8)


@dataclass(frozen=True)
class Refitted:
    """Groups with integer zero points: `codes` uint8 `[rows, groups, group]`, others per group."""

    codes: torch.Tensor
    zero_point: torch.Tensor
    step: torch.Tensor


def refit(
    dense: torch.Tensor, codes: torch.Tensor | None, found: ZeroPoints | None, bits: int
) -> Refitted:
    """The best of a few codes with an integer zero point for every group, by squared error.

    `dense` float32 `[rows, groups, group]` is what is to be met. Candidates: the `codes` of the
    artifact with the zero point of `found`; the nearest codes at that step and zero point; the
    nearest codes of a step that spans the group's range with zero in it. The last alone where
    `codes` and `found` are None, as for levels that are not uniform. Each gets the step that is
    best for its codes, `sum(w d) / sum(d d)` with `d = q - zp`; ties go to the one named first.
    """
    last = (1 << bits) - 1
    wide = dense.double()
    candidates: list[tuple[torch.Tensor, torch.Tensor]] = []
    if codes is not None and found is not None:
        candidates.append((codes.double(), found.zero_point.double()))
        candidates.append((_nearest(wide, found.step, candidates[0][1], last), candidates[0][1]))
    low, high = wide.amin(2).clamp_(max=0), wide.amax(2).clamp_(min=0)
    step = (high - low) / last
    zero = (-low / step).nan_to_num_(0.0).round_().clamp_(0, last)
    candidates.append((_nearest(wide, step, zero, last), zero))
    best = _fit(wide, *candidates[0])
    for candidate in candidates[1:]:
        best = _better(best, _fit(wide, *candidate))
    _, chosen, zero, step = best
    return Refitted(chosen.to(torch.uint8), zero.to(torch.uint8), step)


_Fit = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _nearest(wide: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, last: int) -> torch.Tensor:
    codes = wide / step[:, :, None]
    return codes.nan_to_num_(0.0).round_().add_(zero[:, :, None]).clamp_(0, last)


def _fit(wide: torch.Tensor, codes: torch.Tensor, zero: torch.Tensor) -> _Fit:
    """Squared error, codes, zero point and the best step; a step is never negative."""
    offset = codes - zero[:, :, None]
    step = (wide * offset).sum(2) / offset.square().sum(2)
    step = step.nan_to_num_(0.0).clamp_(min=0)
    error = (offset.mul_(step[:, :, None]) - wide).square_().sum(2)
    return error, codes, zero, step


def _better(first: _Fit, second: _Fit) -> _Fit:
    take = second[0] < first[0]
    error, zero, step = (torch.where(take, second[i], first[i]) for i in (0, 2, 3))
    return error, torch.where(take[:, :, None], second[1], first[1]), zero, step
