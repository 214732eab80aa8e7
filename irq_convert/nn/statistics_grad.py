"""Gradients of scale and tau: sums over a block of what would be the gradient of the weight.

    W = level[code] * scale + tau       G = dL/dy^T x       (dL/dW, never whole)
    dL/dscale = sum over the block of level[code] * G       dL/dtau = sum over the block of G

The sum for tau goes through the block sums of x, which is a product smaller by the block size; for
scale the levels stand in the sum, so it walks over tiles of G.
"""

from __future__ import annotations

import torch

from irq_convert.core.dequantize import dequantize_rows
from irq_convert.core.elastic import block_sums
from irq_convert.core.moved import as_levels
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.working_dtype import no_autocast, working_dtype

TILE = 1 << 24
"""Bytes of G, and as many of levels, at a time."""


def statistics_grad(
    grad: torch.Tensor, x: torch.Tensor, q: QuantizedTensor, scale: bool, tau: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the scales and taus of `q`, float32 `[rows, blocks]`; None where not asked for.

    `grad` `[..., rows]` is that of `x W^T`, `x` `[..., cols]`, both of one floating dtype, in which
    the products are taken, or in float32 (`working_dtype`). Differentiable in `grad` and `x`.
    """
    wide = working_dtype(grad)
    if wide is not grad.dtype:
        with no_autocast():
            return statistics_grad(grad.to(wide), x.to(wide), q, scale, tau)
    flat, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    return (
        _of_scale(flat, inputs, q) if scale else None,
        (flat.T @ block_sums(inputs, q.block_size)).float() if tau else None,
    )


def _of_scale(grad: torch.Tensor, x: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    rows, levels = q.codes.shape[0], as_levels(q)
    step = max(1, TILE // max(1, q.cols * grad.element_size()))
    if rows <= step or torch.is_grad_enabled():  # a second derivative keeps all factors
        weights = dequantize_rows(levels, 0, rows, grad.dtype)
        return block_sums(grad.T @ x * weights, q.block_size).float()
    result = torch.empty(rows, q.shape.blocks_per_row, dtype=torch.float32, device=grad.device)
    products, weights = (grad.new_empty(step, q.cols) for _ in range(2))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        product = torch.mm(grad[:, begin:end].T, x, out=products[: end - begin])
        product *= dequantize_rows(levels, begin, end, grad.dtype, out=weights[: end - begin])
        result[begin:end] = block_sums(product, q.block_size)
    return result
