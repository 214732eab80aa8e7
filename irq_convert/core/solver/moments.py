"""Second moments of a layer's inputs, and what the solver needs of them.

`H = sum x^ x^T` over the inputs x^ of the quantized model, `C = sum (x - x^) x^T`, where x are
those of the source. In exact algebra

    || X W^T - X^ Q^T ||^2 = || X^ (W* - Q)^T ||^2 + const,    W* = W + W C (H + lambda I)^-1,

so correcting for the layers before is quantizing W* against H (the one formula behind GPTAQ, QEP,
Qronos and their kind).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from irq_convert.errors import IrqError

WIDE = 8192
"""From so many columns on factors are float32: three float64 matrices would not be bounded."""
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


def damped(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """`moments` float32 `[cols, cols]` with `damping` times the mean diagonal on it, as a copy.

    Columns that never saw an input get the mean, so that they keep to their weights.
    """
    found = moments.clone()
    diagonal = found.diagonal()
    mean = float(diagonal.double().mean())
    dead = diagonal <= 0
    diagonal += damping * mean if mean > 0 else 1.0
    diagonal[dead] = mean if mean > 0 else 1.0
    return found


def factorize(moments: torch.Tensor, damping: float, name: str) -> Factor:
    """Factor `moments`, float32 `[cols, cols]`, columns by falling diagonal, ties by index.

    `damping`, a part of the mean diagonal, is doubled until the factor exists. Raises `IrqError`
    naming the tensor for moments that are not finite.
    """
    if not bool(torch.isfinite(moments).all()):
        raise IrqError(f"{name}: the second moments of its inputs are NaN or infinite")
    order = moments.diagonal().argsort(descending=True, stable=True)
    backwards = order.flip(0)
    wide = torch.float64 if len(order) < WIDE else torch.float32
    for _ in range(_TRIES):
        flipped = damped(moments, damping)[backwards][:, backwards].to(wide)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        del flipped
        if not bool(failed):
            # H = (J L J) (J L J)^T with J the reversal: its factor is upper in the sweep's order.
            upper = lower.flip(0, 1)
            del lower
            feedback = upper.div_(upper.diagonal().clone()).T.contiguous().float()
            return Factor(order, feedback, damping)
        damping *= 2
    raise IrqError(f"{name}: the second moments of its inputs cannot be factored")


def corrected(
    weight: torch.Tensor, moments: torch.Tensor, cross: torch.Tensor, alpha: float, ridge: float
) -> torch.Tensor:
    """`W + alpha W C (H + ridge I)^-1`, float32 `[rows, cols]`; `ridge` in mean diagonals.

    `moments` H and `cross` C, float32 `[cols, cols]`.
    """
    wide = torch.float64 if len(moments) < WIDE else torch.float32
    lower, failed = torch.linalg.cholesky_ex(damped(moments, ridge).to(wide))
    if bool(failed):
        return weight
    pulled = (weight @ cross).to(wide)
    return weight + alpha * torch.cholesky_solve(pulled.T, lower).T.float()
