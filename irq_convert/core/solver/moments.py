"""Second moments of a layer's inputs, and what the solver needs of them.

`H = sum z z^T` over the inputs z of the quantized model, `C = sum (x - z) z^T`, where x are those
of the source. In exact algebra, with lambda 0,

    || X W^T - Z Q^T ||^2 = || Z (W* - Q)^T ||^2 + const,    W* = W + W C (H + lambda I)^-1,

so correcting for the layers before is quantizing W* against H (the one formula behind GPTAQ, QEP,
Qronos and their kind).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from irq_convert.core.solver.cholesky import factor_in_place, solve_factored
from irq_convert.errors import IrqError

WIDE = 8192
"""From so many columns on factors are float32: three float64 matrices would not be bounded."""
ROWS = 1024
"""Rows that are corrected at a time."""
_TRIES = 40


@dataclass(frozen=True)
class Factor:
    """`H + damping I = V D V^T` in the order of the sweep.

    `order` int64 `[cols]`; `feedback` float32 `[cols, cols]`, V transposed, unit lower triangular.
    `damping` is what was added to the diagonal until the factor existed.
    """

    order: torch.Tensor
    feedback: torch.Tensor
    damping: float


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices are in float32 all through, not in TF32 as a GPU may.

    torch keeps two sets of names for that, and refuses to read the older one where it contradicts
    the other; both say the same within, and what they said before after it.
    """
    backends: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    )
    newer = [each for each in backends if hasattr(each, "fp32_precision")]  # from torch 2.9 on
    before = [each.fp32_precision for each in newer]
    older = None
    with suppress(RuntimeError):
        older = torch.get_float32_matmul_precision()
    try:
        if older is not None:
            torch.set_float32_matmul_precision("highest")
        for each in newer:
            each.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for each, precision in zip(newer, before, strict=True):
            each.fp32_precision = precision


def damped(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """`moments` float32 `[cols, cols]` with `damping` times the mean diagonal on it, as a copy.

    Columns that never saw an input get the mean, so that they keep to their weights.
    """
    found = moments.clone()
    _damp(found.diagonal(), damping)
    return found


def _damp(diagonal: torch.Tensor, damping: float) -> None:
    mean = float(diagonal.double().mean())
    dead = diagonal <= 0
    diagonal += damping * mean if mean > 0 else 1.0
    diagonal[dead] = mean if mean > 0 else 1.0


@contextmanager
def damped_in_place(moments: torch.Tensor, damping: float) -> Iterator[torch.Tensor]:
    """`damped` for as long as the block runs, without a copy: `moments` may be large."""
    diagonal = moments.diagonal()
    before = diagonal.clone()
    _damp(diagonal, damping)
    try:
        yield moments
    finally:
        diagonal.copy_(before)


def factorize(moments: torch.Tensor, damping: float, name: str) -> Factor:
    """Factor `moments`, float32 `[cols, cols]`, columns by falling diagonal, ties by index.

    `damping`, a part of the mean diagonal, is doubled until the factor exists. Raises `IrqError`
    naming the tensor for moments that are not finite.
    """
    if not all(map(math.isfinite, moments.aminmax())):  # a test of each would take copies of H
        raise IrqError(f"{name}: the second moments of its inputs are NaN or infinite")
    order = moments.diagonal().argsort(descending=True, stable=True)
    wide = torch.float64 if len(order) < WIDE else torch.float32
    for _ in range(_TRIES):
        found = moments[order[:, None], order]
        _damp(found.diagonal(), damping)
        found = found.to(wide)
        with full_precision():
            exists = factor_in_place(found)
        if exists:  # H = L^T L, so that V = L^T with columns divided by their diagonal
            found /= found.diagonal().clone()[:, None]
            return Factor(order, found.float(), damping)
        damping *= 2
    raise IrqError(f"{name}: the second moments of its inputs cannot be factored")


def pulled(weight: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """`W C`, float32 `[rows, cols]`: all that `corrections` needs of C, which is large."""
    with full_precision():
        return weight @ cross


def corrections(
    weights: Sequence[torch.Tensor],
    pulls: Sequence[torch.Tensor],
    moments: torch.Tensor,
    part: float,
    ridge: float,
) -> list[torch.Tensor]:
    """`W + part W C (H + ridge I)^-1` of several matrices W that are given the same inputs.

    `pulls` are `W C`, as of `pulled`; `moments` H, float32 `[cols, cols]`; `ridge` in mean
    diagonals. The result, float32 `[rows, cols]`, is in the memory of `pulls`, which are lost.
    """
    wide = torch.float64 if len(moments) < WIDE else torch.float32
    factor = damped(moments, ridge).to(wide)
    with full_precision():
        if not factor_in_place(factor):
            return list(weights)
        for weight, pull in zip(weights, pulls, strict=True):
            for rows, right in zip(weight.split(ROWS), pull.split(ROWS), strict=True):
                change = solve_factored(factor, right.T.to(wide)).T.float()
                torch.add(rows, change, alpha=part, out=right)
        return list(pulls)
