# mypy: disallow-untyped-defs=False
"""One pass of the descent over the codes of a block, each moved to where the error is least.

The pair (tau, scale) has been refitted before, and what the block's changes mean for other blocks
is told after it, both in products of matrices (`core.solver.portable.descend_rows`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from irq_convert.core.triton.arithmetic import LAUNCH
from irq_convert.core.triton.quantize import on_device, spread, together
from irq_convert.core.triton.sweep import TILE, nearest

if TYPE_CHECKING:
    from irq_convert.core.solver.portable import Book


@triton.jit(
    do_not_specialize=["rows", "width", "stride"],
    do_not_specialize_on_alignment=["moments", "inverse"],
)
def descend_panel(
    value, gain, moments, inverse, scale, tau, levels, mids, codes, rows, width, stride,
    N_LEVELS: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Codes, uint8 `[rows, width]`, of `R` rows of a block, from `value` and `gain` alike.

    `moments`: H from the block's first row and column on, its rows `stride` apart; `inverse`: one
    over its diagonal there. `scale` and `tau`: float32 `[rows]`. `P` is at least `width`.
    """
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    real = row < rows
    begin = row.to(tl.int64) * width
    j = tl.arange(0, P)[None, :]
    inside = real & (j < width)
    gains = tl.load(gain + begin + j, mask=inside, other=0.0)
    s, t = tl.load(scale + row, mask=real, other=0.0), tl.load(tau + row, mask=real, other=0.0)
    found = tl.zeros((R, P), tl.int32)
    for i in range(width):
        here = j == i
        before = tl.load(value + begin + i, mask=real, other=0.0)
        pull = tl.sum(tl.where(here, gains, 0.0), 1)[:, None] * tl.load(inverse + i)
        code, level = nearest(before + pull, s, t, levels, mids, N_LEVELS)
        found = tl.where(here, code, found)
        felt = tl.load(moments + i * stride + j, mask=j < width, other=0.0)
        gains -= (level - before) * felt
    tl.store(codes + begin + j, found.to(tl.uint8), mask=inside)


def descend_panel_triton(
    value: torch.Tensor,
    gain: torch.Tensor,
    moments: torch.Tensor,
    inverse: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    book: Book,
) -> torch.Tensor:
    """`core.solver.portable.descend_panel` in one launch."""
    rows, width = value.shape
    codes = torch.empty((rows, width), dtype=torch.uint8, device=value.device)
    padded = triton.next_power_of_2(width)
    at_once = together(rows, padded, TILE)
    assert moments.stride(1) == 1
    with on_device(value.device):
        descend_panel[spread(rows, at_once)](
            value.contiguous(), gain.contiguous(), moments, inverse.contiguous(),
            scale.contiguous(), tau.contiguous(), book.levels, book.mids, codes, rows, width,
            moments.stride(0), N_LEVELS=len(book.levels), P=padded, R=at_once, **LAUNCH,
        )  # fmt: skip
    return codes
