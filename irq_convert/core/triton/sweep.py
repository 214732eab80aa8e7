# mypy: disallow-untyped-defs=False
"""A panel of the sweep: its columns one after another, each fed back to those behind it.

What earlier panels add is in `value` already (`core.solver.portable.sweep_rows`). A program holds
some rows of the whole panel; rows depend on no other row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from irq_convert.core.triton.arithmetic import LAUNCH
from irq_convert.core.triton.quantize import on_device, spread, together

if TYPE_CHECKING:
    from irq_convert.core.solver.portable import Book

TILE = 1024
"""Weights of whole rows of a panel that one program holds."""


@triton.jit
def nearest(value, scale, tau, levels, mids, N_LEVELS: tl.constexpr):
    """`(code int32, level[code] * scale + tau)` of the level nearest to `value`."""
    code = tl.zeros(value.shape, tl.int32)
    for k in tl.static_range(N_LEVELS - 1):
        code += (value >= tau + tl.load(mids + k) * scale).to(tl.int32)
    return code, tl.load(levels + code) * scale + tau


@triton.jit(
    do_not_specialize=["rows", "width", "stride"], do_not_specialize_on_alignment=["feedback"]
)
def sweep_panel(
    weight, value, scale, tau, feedback, levels, mids, codes, wrong, rows, width, stride,
    N_LEVELS: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Codes, uint8, and `w - q` of `R` rows of a panel, all `[rows, width]` float32 otherwise.

    `feedback`: V transposed from the panel's first column on, its rows `stride` apart. `P` is at
    least `width`.
    """
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    real = row < rows
    begin = row.to(tl.int64) * width
    j = tl.arange(0, P)[None, :]
    inside = real & (j < width)
    values = tl.load(value + begin + j, mask=inside, other=0.0)
    found = tl.zeros((R, P), tl.int32)
    left = tl.zeros((R, P), tl.float32)
    for i in range(width):
        here = j == i
        now = tl.sum(tl.where(here, values, 0.0), 1)[:, None]
        s = tl.load(scale + begin + i, mask=real, other=0.0)
        t = tl.load(tau + begin + i, mask=real, other=0.0)
        code, level = nearest(now, s, t, levels, mids, N_LEVELS)
        off = tl.load(weight + begin + i, mask=real, other=0.0) - level
        found = tl.where(here, code, found)
        left = tl.where(here, off, left)
        pull = tl.load(feedback + j * stride + i, mask=(j > i) & (j < width), other=0.0)
        values += off * pull
    tl.store(codes + begin + j, found.to(tl.uint8), mask=inside)
    tl.store(wrong + begin + j, left, mask=inside)


def sweep_panel_triton(
    weight: torch.Tensor,
    value: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    feedback: torch.Tensor,
    book: Book,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`core.solver.portable.sweep_panel` in one launch."""
    rows, width = weight.shape
    codes = torch.empty((rows, width), dtype=torch.uint8, device=weight.device)
    wrong = torch.empty((rows, width), dtype=torch.float32, device=weight.device)
    padded = triton.next_power_of_2(width)
    at_once = together(rows, padded, TILE)
    assert feedback.stride(1) == 1
    with on_device(weight.device):
        sweep_panel[spread(rows, at_once)](
            weight.contiguous(), value.contiguous(), scale.contiguous(), tau.contiguous(),
            feedback, book.levels, book.mids, codes, wrong, rows, width, feedback.stride(0),
            N_LEVELS=len(book.levels), P=padded, R=at_once, **LAUNCH,
        )  # fmt: skip
    return codes, wrong
