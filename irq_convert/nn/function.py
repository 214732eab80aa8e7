"""`y = x W^T + b` for a packed `W`: the dense weight exists only while a product is computed.

In a model that is not trained, a few inputs are multiplied with the packed weight itself
(`core/decode.py`). Otherwise the autograd function saves nothing but the packed parts, which the
module owns anyway, and the input where statistics are trained, and dequantizes again for the
gradient of the input. The products walk over tiles of the weight, of rows forward and of columns
backward, so that the dense weight is never whole. Four operators, `irq::product`, `irq::linear`,
`irq::linear_grad` and `irq::statistics_grad`, keep compilers from looking inside, so a compiled
model computes the same bits.
"""

from __future__ import annotations

from typing import Any

import torch

from irq_convert.core import product
from irq_convert.core.decode import packed_product
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.product import tiled_product
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.working_dtype import no_autocast, working_dtype
from irq_convert.nn.parts import cut_columns, without_grids
from irq_convert.nn.statistics_grad import statistics_grad


def packed_linear(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None, *, training: bool = True
) -> torch.Tensor:
    """`x @ W^T + bias` with `W` the dense values of `q` in the dtype of `x`.

    `x` floating `[..., cols]`, `bias` `[rows]` of the same dtype; returns `[..., rows]`.
    Differentiable in `x` and `bias`, and in floating statistics that require gradients. Where
    neither `training` nor gradients are on it is `packed_product`: for a few inputs at least as
    near to the exact product, and not the same bits. (Training runs without gradients, too, where a
    checkpoint is computed again later, and has to find the same bits then.)
    """
    parts = (q.codes, q.scale, q.tau, q.scale_grid, q.tau_grid, q.cols, q.codebook, q.block_size)
    if training or torch.is_grad_enabled():
        return _PackedLinear.apply(x, bias, *parts)
    if _is_plain(x):
        return packed_product(x, q, bias)
    product: torch.Tensor = torch.ops.irq.product(x, bias, *parts)
    return product


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, *parts: Any) -> torch.Tensor:
        kept = x if any(ctx.needs_input_grad[3:5]) else None
        ctx.save_for_backward(kept, *parts[:5])
        ctx.layout = parts[5:]
        if _is_plain(x):
            return tiled_product(x, QuantizedTensor(*parts), bias)
        return torch.ops.irq.linear(x, bias, *parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, *stored = ctx.saved_tensors
        parts = (*stored, *ctx.layout)
        grad_x = grad_bias = grad_scale = grad_tau = None
        if ctx.needs_input_grad[0]:
            if not _is_plain(grad):
                grad_x = torch.ops.irq.linear_grad(grad, *parts)
            elif torch.is_grad_enabled():  # for a second derivative autograd keeps the factors
                grad_x = grad @ dequantize_tensor(QuantizedTensor(*parts), grad.dtype)
            else:
                grad_x = _linear_grad(grad, QuantizedTensor(*parts))
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        if x is not None:
            grad_scale, grad_tau = _statistics_grad(grad, x, parts, ctx.needs_input_grad[3:5])
        return (grad_x, grad_bias, None, grad_scale, grad_tau, *(None,) * 5)


def _statistics_grad(
    grad: torch.Tensor, x: torch.Tensor, parts: tuple[Any, ...], asked: tuple[bool, bool]
) -> list[torch.Tensor | None]:
    q = QuantizedTensor(*parts)
    found: Any
    if _is_plain(grad) and _is_plain(x):
        found = statistics_grad(grad, x, q, *asked)
    else:
        found = torch.ops.irq.statistics_grad(grad, x, q.codes, *parts[5:], *asked)
        found = [each if wanted else None for each, wanted in zip(found, asked, strict=True)]
    stored = (q.scale, q.tau)
    return [
        None if each is None else each.to(part.dtype)
        for each, part in zip(found, stored, strict=True)
    ]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is real memory and nobody traces: then the operators are a detour."""
    return type(tensor) is torch.Tensor and not torch.compiler.is_compiling()


def _linear_grad(grad: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    """`grad @ W` over tiles of columns: no sum is split, so one rounding, as without tiles."""
    wide = working_dtype(grad)
    if wide is grad.dtype:
        return _tiled_grad(grad, q, grad.dtype)
    with no_autocast():
        return _tiled_grad(grad.to(wide), q, grad.dtype).to(grad.dtype)


def _tiled_grad(grad: torch.Tensor, q: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """`grad @ W` in the dtype of `grad`, the values of `W` being of `dtype`."""
    rows, blocks = q.codes.shape[0], q.shape.blocks_per_row
    step = max(1, product.LARGE_TILE // max(1, rows * q.block_size * grad.element_size()))
    if blocks <= step:
        return grad @ dequantize_tensor(q, dtype).to(grad.dtype)
    plain = without_grids(q)
    flat = grad.reshape(-1, rows)
    grad_x = flat.new_empty(flat.shape[0], q.cols)
    buffer = flat.new_empty(rows * step * q.block_size, dtype=dtype)
    for first in range(0, blocks, step):
        part = cut_columns(plain, first, min(first + step, blocks))
        tile = buffer[: rows * part.cols].view(rows, part.cols)
        begin = first * q.block_size
        weight = dequantize_tensor(part, dtype, out=tile)
        grad_x[:, begin : begin + part.cols] = flat @ weight.to(grad.dtype)
    return grad_x.view(*grad.shape[:-1], q.cols)


@torch.library.custom_op("irq::product", mutates_args=())
def _product_op(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    scale_grid: torch.Tensor | None,
    tau_grid: torch.Tensor | None,
    cols: int,
    codebook: str,
    block_size: int,
) -> torch.Tensor:
    q = QuantizedTensor(codes, scale, tau, scale_grid, tau_grid, cols, codebook, block_size)
    return packed_product(x, q, bias)


@torch.library.custom_op("irq::linear", mutates_args=())
def _linear_op(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    scale_grid: torch.Tensor | None,
    tau_grid: torch.Tensor | None,
    cols: int,
    codebook: str,
    block_size: int,
) -> torch.Tensor:
    q = QuantizedTensor(codes, scale, tau, scale_grid, tau_grid, cols, codebook, block_size)
    return tiled_product(x, q, bias)


@_product_op.register_fake
@_linear_op.register_fake
def _linear_fake(
    x: torch.Tensor, bias: torch.Tensor | None, codes: torch.Tensor, *parts: Any
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("irq::linear_grad", mutates_args=())
def _linear_grad_op(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    scale_grid: torch.Tensor | None,
    tau_grid: torch.Tensor | None,
    cols: int,
    codebook: str,
    block_size: int,
) -> torch.Tensor:
    q = QuantizedTensor(codes, scale, tau, scale_grid, tau_grid, cols, codebook, block_size)
    return _linear_grad(grad, q)


@_linear_grad_op.register_fake
def _linear_grad_fake(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    scale_grid: torch.Tensor | None,
    tau_grid: torch.Tensor | None,
    cols: int,
    codebook: str,
    block_size: int,
) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], cols)


@torch.library.custom_op("irq::statistics_grad", mutates_args=())
def _statistics_grad_op(
    grad: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    cols: int,
    codebook: str,
    block_size: int,
    scale: bool,
    tau: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = _statistics_fake(grad, x, codes, cols, codebook, block_size, scale, tau)
    # The levels of the codes are all that counts of the weight.
    q = QuantizedTensor(codes, first, second, None, None, cols, codebook, block_size)
    of_scale, of_tau = statistics_grad(grad, x, q, scale, tau)
    return first if of_scale is None else of_scale, second if of_tau is None else of_tau


@_statistics_grad_op.register_fake
def _statistics_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    codes: torch.Tensor,
    cols: int,
    codebook: str,
    block_size: int,
    scale: bool,
    tau: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (codes.shape[0], -(-cols // block_size))
    sizes = (shape if scale else (0, 0), shape if tau else (0, 0))
    first, second = (grad.new_empty(size, dtype=torch.float32) for size in sizes)
    return first, second
