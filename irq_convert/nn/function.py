"""`y = x W^T + b` for a packed `W`: the dense weight exists only while a product is computed.

The autograd function saves nothing but the packed parts, which the module owns anyway, and
dequantizes again for the gradient of the input. Two operators, `irq::linear` and
`irq::dequantize`, keep compilers from looking inside, so a compiled model computes the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from irq_convert.core.dequantize import dequantize_rows, dequantize_tensor
from irq_convert.core.quantized import QuantizedTensor

FEW_ROWS = 16
"""Inputs of at most this many rows use small tiles, which stay in the cache until multiplied."""
SMALL_TILE = 1 << 21
LARGE_TILE = 1 << 25
"""Bytes of dense weights at a time on the CPU; fresh memory costs more than filling it."""


def packed_linear(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ W^T + bias` with `W` the dense values of `q` in the dtype of `x`.

    `x` floating `[..., cols]`, `bias` `[rows]` of the same dtype; returns `[..., rows]`.
    Differentiable in `x` and `bias`.
    """
    return _PackedLinear.apply(
        x, bias, q.codes, q.scale, q.tau, q.scale_grid, q.tau_grid, q.cols, q.codebook, q.block_size
    )


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, *parts: Any) -> torch.Tensor:
        ctx.save_for_backward(*parts[:5])
        ctx.layout = parts[5:]
        if _is_plain(x):
            return _linear(x, QuantizedTensor(*parts), bias)
        return torch.ops.irq.linear(x, bias, *parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        parts = (*ctx.saved_tensors, *ctx.layout)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            if _is_plain(grad):
                weight = dequantize_tensor(QuantizedTensor(*parts), grad.dtype)
            else:
                weight = torch.ops.irq.dequantize(*parts, grad.dtype)
            grad_x = grad @ weight
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return (grad_x, grad_bias, *(None,) * 8)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is real memory and nobody traces: then the operators are a detour."""
    return type(tensor) is torch.Tensor and not torch.compiler.is_compiling()


def _linear(x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows, row_bytes = q.codes.shape[0], q.cols * x.element_size()
    tile_bytes = SMALL_TILE if x.numel() <= FEW_ROWS * q.cols else LARGE_TILE
    step = max(1, tile_bytes // row_bytes)
    if x.device.type != "cpu" or rows <= step:
        return functional.linear(x, dequantize_tensor(q, x.dtype), bias)
    y = x.new_empty(*x.shape[:-1], rows)
    tile = x.new_empty(step, q.cols)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        weight = dequantize_rows(q, begin, end, x.dtype, out=tile[: end - begin])
        part = None if bias is None else bias[begin:end]
        y[..., begin:end] = functional.linear(x, weight, part)
    return y


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
    return _linear(x, q, bias)


@_linear_op.register_fake
def _linear_fake(
    x: torch.Tensor, bias: torch.Tensor | None, codes: torch.Tensor, *parts: Any
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("irq::dequantize", mutates_args=())
def _dequantize_op(
    codes: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    scale_grid: torch.Tensor | None,
    tau_grid: torch.Tensor | None,
    cols: int,
    codebook: str,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    q = QuantizedTensor(codes, scale, tau, scale_grid, tau_grid, cols, codebook, block_size)
    return dequantize_tensor(q, dtype)


@_dequantize_op.register_fake
def _dequantize_fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    scale_grid: torch.Tensor | None,
    tau_grid: torch.Tensor | None,
    cols: int,
    codebook: str,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty(codes.shape[0], cols, dtype=dtype)
