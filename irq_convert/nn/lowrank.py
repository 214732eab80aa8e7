"""`result + s (x A^T) B^T` in one autograd node that passes over `result` once.

As separate operations the sum, the scale and their gradients each walk over tensors as large as
the layer's output; next to a small model's product that is what an adapter costs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def add_low_rank(
    result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """`result + scale * (x @ a.T) @ b.T`, written into `result` where that is sound.

    `result` `[..., rows]`, `x` `[..., cols]`, `a` `[rank, cols]`, `b` `[rows, rank]`. `result` is
    to be the output of a linear layer, which no gradient needs. Differentiable in all four.
    """
    tensors = (result, x, a, b)
    mixed = any(tensor.dtype != result.dtype for tensor in tensors)
    traced = torch.compiler.is_compiling() or any(
        type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors
    )
    if mixed or traced or torch.is_autocast_enabled(x.device.type):
        return result + functional.linear(functional.linear(x, a) * scale, b)
    return _AddLowRank.apply(result, x, a, b, scale)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        inner = functional.linear(x, a)
        if scale != 1:
            inner.mul_(scale)
        ctx.save_for_backward(x, inner, a, b)
        ctx.scale = scale
        own = result.is_contiguous() and not result._is_view() and result is not x
        if own and not _is_leaf(result):
            ctx.mark_dirty(result)
        else:
            result = result.clone(memory_format=torch.contiguous_format)
        result.view(-1, result.shape[-1]).addmm_(_rows(inner), b.T)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, inner, a, b = ctx.saved_tensors
        need_result, need_x, need_a, need_b, _ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = None
        rows = _rows(grad)
        if need_b:
            if torch.is_grad_enabled():  # a second derivative has to find its way to x and a
                inner = functional.linear(x, a) * ctx.scale
            grad_b = rows.T @ _rows(inner)
        if need_x or need_a:
            back = (rows @ b).mul_(ctx.scale)
            if need_a:
                grad_a = back.T @ _rows(x)
            if need_x:
                grad_x = (back @ a).view(x.shape)
        return grad if need_result else None, grad_x, grad_a, grad_b, None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _is_leaf(tensor: torch.Tensor) -> bool:
    return tensor.is_leaf and tensor.requires_grad
