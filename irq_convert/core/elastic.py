"""The parameter-free maps of IEC (Information Elastic Connection) and of block-pooled adapters.

One family of matrices serves both connections: `M(rows, cols)` takes the mean of each of
`g = gcd(rows, cols)` contiguous groups of its input and repeats it `rows / g` times in a row,

    M[k, j] = g / cols  if k // (rows / g) == j // (cols / g)  else 0.

The method's P, which averages the input, is `M(rank, in_features)`; its E, which repeats the
latent vector, is `M(out_features, rank)`. Neither is ever built for computing: `elastic` applies
one, `fold_elastic` adds one to a weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional


def elastic(x: torch.Tensor, rows: int) -> torch.Tensor:
    """`x M(rows, cols)^T` for `x` `[..., cols]`: `[..., rows]` in the dtype of `x`."""
    groups = math.gcd(rows, x.shape[-1])
    means = x.unflatten(-1, (groups, -1)).mean(-1)
    return means.repeat_interleave(rows // groups, dim=-1)


def fold_elastic(
    weight: torch.Tensor, beta: torch.Tensor, columns: torch.Tensor | None = None
) -> torch.Tensor:
    """`weight + beta * M(rows, cols) * columns` as a new tensor; differentiable in both.

    `weight` floating `[rows, cols]`, `beta` one number, `columns` `[cols]` or None for ones.
    A product with the folded weight costs no more than one with `weight`.
    """
    return _Fold.apply(weight, beta, columns)


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, beta: torch.Tensor, columns: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(columns)
        folded = weight.clone(memory_format=torch.contiguous_format)
        on, share = _support(folded)
        factor = beta.to(weight.dtype) * share
        on.add_(factor if columns is None else factor * _by_group(columns, on).to(weight.dtype))
        ctx.beta_dtype = beta.dtype
        ctx.beta_shape = beta.shape
        return folded

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        (columns,) = ctx.saved_tensors
        on, share = _support(grad.contiguous())
        if columns is not None:
            on = on * _by_group(columns, on).to(grad.dtype)
        grad_beta = (on.sum() * share).to(ctx.beta_dtype).reshape(ctx.beta_shape)
        return grad, grad_beta, None


def _support(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """View of the entries where `M` is not 0, `[rows / g, cols / g, g]`, and its value there."""
    rows, cols = weight.shape
    groups = math.gcd(rows, cols)
    blocks = weight.view(groups, rows // groups, groups, cols // groups)
    return blocks.diagonal(0, 0, 2), groups / cols


def _by_group(columns: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
    """`[cols]` as `[cols / g, g]`, to broadcast against a support."""
    return columns.view(on.shape[2], on.shape[1]).T


def block_sums(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """The sum of each block of `block_size` inputs; a short last block is one of its own.

    `x` `[..., cols]` to `[..., ceil(cols / block_size)]`.
    """
    padding = -x.shape[-1] % block_size
    if padding:
        x = functional.pad(x, (0, padding))
    return x.unflatten(-1, (-1, block_size)).sum(-1)


def repeat_blocks(weight: torch.Tensor, cols: int, block_size: int) -> torch.Tensor:
    """The transpose of `block_sums` on columns: `[rows, blocks]` to `[rows, cols]`."""
    return weight.repeat_interleave(block_size, dim=-1)[..., :cols]


def block_weights(cols: int, block_size: int, device: Any = None) -> torch.Tensor:
    """1 over the length of each block of `cols` inputs, fp64 `[blocks]`: sums to means."""
    blocks = -(-cols // block_size)
    lengths = torch.full((blocks,), float(block_size), dtype=torch.float64, device=device)
    if blocks:
        lengths[-1] = cols - (blocks - 1) * block_size
    return 1 / lengths
