"""`icq_search`: the continuous ICQ search, before anything is rounded to 8 bits.

What `quantize_tensor` stores is chosen among storable pairs; this is the optimum over all real
ones, which the stored result is judged against.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from irq_convert.core.codebook import Codebook, get_codebook
from irq_convert.core.ideal.oracle import IcqResult, breakpoint_search, search_window
from irq_convert.core.ideal.sweep import sweep_blocks
from irq_convert.core.kernels.path import Book, Range
from irq_convert.core.kernels.search import ENTROPY, ERROR
from irq_convert.core.objective import Objective
from irq_convert.core.search_plan import entropy_shift, entropy_table
from irq_convert.errors import IrqError, UsageError

__all__ = ["IcqResult", "icq_search"]

OBJECTIVES = (Objective.ENTROPY, Objective.MSE)
BACKENDS = ("auto", "numba", "torch")
LIMIT = 2.0**120


def icq_search(
    blocks: torch.Tensor,
    codebook: Codebook | str,
    *,
    objective: str = "entropy",
    lengths: torch.Tensor | None = None,
    backend: str = "auto",
) -> IcqResult:
    """The best real-valued (tau, scale) of each block, `blocks` being float32 `[n, B]`.

    A weight has code `#{k : w >= tau + m_k * s}` with m_k the midpoints between levels, and comes
    back as `level[code] * s + tau`. "entropy" maximizes `H = -sum p_k log2 p_k` of the codes:

    * normal-float: tau = median + t, |t| <= 0.0541 * max|w - median|, s = max(hi - tau, tau - lo);
    * integer: tau = p * (lo + hi) / 2 and s = p * (hi - lo) / 2, |p - 1| <= 0.1.

    "mse" minimizes the squared error: normal-float with |t| <= 0.2 * max|w - median| and s as
    above times c, for c from 0.6 to 1 by 0.05; integer with tau = (lo + hi) / 2 + t,
    |t| <= 0.2 * half and s = c * half, where half = (hi - lo) / 2.

    Windows hold their ends however those are rounded (they are wider by a factor 1 + 2**-20).
    Each is searched whole, not sampled: boundaries `tau + m_k * s` are piecewise linear in
    t, so codes only change at crossings known in closed form, and between two of them the squared
    error is a quadratic. Equal entropy goes to the lower squared error, then to the smaller |t|
    (|p - 1|). A block without range gets scale 0 and tau its value; tau is then exact.

    `lengths`: integers `[n]` from 1 to B, how many weights of each row count (default all).
    `backend`: "numba" on the CPU, "torch" brute force on any device, "auto" by device; the two
    agree on the optimum, and may pick pairs that differ in the last bits. Raises `UsageError` for
    wrong shapes, dtypes or options, `IrqError` for NaN, infinities or magnitudes from 2**120 on.
    """
    book = get_codebook(codebook) if isinstance(codebook, str) else codebook
    if objective not in OBJECTIVES:
        raise UsageError(f"unknown objective {objective!r}: choose one of {', '.join(OBJECTIVES)}")
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if blocks.dim() != 2 or not blocks.shape[1] or blocks.dtype != torch.float32:
        raise UsageError(
            f"blocks are {blocks.dtype} {list(blocks.shape)}: float32 [n, B] is needed"
        )
    lengths = _check_lengths(blocks, lengths)
    inside = torch.arange(blocks.shape[1], device=blocks.device) < lengths[:, None]
    # Padding may hold anything, NaN too; from here on it is zero.
    clean = blocks.detach().where(inside, 0.0) + 0.0
    if not bool((clean.abs() < LIMIT).all()):
        raise IrqError("blocks hold NaN, infinite weights or magnitudes of 2^120 or more")
    if backend == "torch" or (backend == "auto" and blocks.device.type != "cpu"):
        return breakpoint_search(clean, book, objective=objective, lengths=lengths)
    return _search_numba(clean.masked_fill(~inside, torch.inf), lengths, book, objective)


def _check_lengths(blocks: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    n, size = blocks.shape
    if lengths is None:
        return torch.full((n,), size, dtype=torch.int64, device=blocks.device)
    if lengths.shape != (n,) or lengths.is_floating_point():
        raise UsageError(
            f"lengths are {lengths.dtype} {list(lengths.shape)}: integers [{n}] needed"
        )
    if n and not 1 <= int(lengths.min()) <= int(lengths.max()) <= size:
        raise UsageError(f"lengths must be from 1 to {size}, the width of the blocks")
    return lengths.to(device=blocks.device, dtype=torch.int64)


def _search_numba(
    padded: torch.Tensor, lengths: torch.Tensor, book: Codebook, objective: str
) -> IcqResult:
    n, size = padded.shape
    pairs, sums, errors = np.empty((n, 2), np.float32), np.empty((n, 2), np.int64), np.empty((n, 2))
    table = entropy_table(max(2, size))
    radius, shrinks = search_window(book, objective)
    sweep_blocks(
        padded.sort(dim=1).values.cpu().numpy(),
        lengths.cpu().numpy(),
        Book(book.midpoint_array(), book.level_array(), table),
        Range(
            uniform=book.uniform,
            objective=ENTROPY if objective == Objective.ENTROPY else ERROR,
            radius=radius,
            shrinks=np.array(shrinks),
        ),
        pairs,
        sums,
        errors,
    )
    many = lengths.cpu().numpy().astype(np.float64)
    unit = math.ldexp(1.0, -entropy_shift(max(2, size)))
    # From the same table, so that a block with a single code has exactly zero bits.
    bits = (table[lengths.cpu().numpy()] - sums[:, 0]) * unit / many
    columns = (pairs[:, 0], pairs[:, 1], bits, sums[:, 0], errors[:, 0], sums[:, 1], errors[:, 1])
    return IcqResult(*(torch.from_numpy(x.copy()).to(padded.device) for x in columns))
