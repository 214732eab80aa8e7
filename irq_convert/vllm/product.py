"""The product of a layer that is made of several stored matrices, as one operator.

`irq::served_linear` keeps compilers from looking inside: vLLM traces its models whole. One call a
layer, because at one token a time the calls themselves cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.decode import packed_product
from irq_convert.core.quantized import QuantizedTensor

DENSE = -1
"""In place of a codebook's number: the matrix is dense."""
_NAMES = tuple(CODEBOOKS)
PARTS = 5
"""Tensors of each matrix: codes, scale, tau and their grids, empty where there is none."""


def codebook_number(name: str) -> int:
    """What stands for codebook `name` in an operator's arguments."""
    return _NAMES.index(name)


def matrix(
    parts: Sequence[torch.Tensor], cols: int, codebook: int, block_size: int
) -> QuantizedTensor:
    """The matrix of `PARTS` tensors in the order of a `QuantizedTensor`'s."""
    codes, scale, tau, *grids = parts
    scale_grid, tau_grid = (grid if grid.numel() else None for grid in grids)
    name = _NAMES[codebook]
    return QuantizedTensor(codes, scale, tau, scale_grid, tau_grid, cols, name, block_size)


def served_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    parts: list[torch.Tensor],
    rows: list[int],
    codebooks: list[int],
    block_sizes: list[int],
) -> torch.Tensor:
    """`x @ W^T + bias`, `W` the matrices one below the other: `[..., cols]` to `[..., rows]`.

    `parts` has `PARTS` tensors of each matrix, or a dense weight and empty ones; `rows`,
    `codebooks` and `block_sizes` one number. Raises as `packed_product`.
    """
    found, begin = [], 0
    for at, count in enumerate(rows):
        own = parts[PARTS * at : PARTS * (at + 1)]
        added = None if bias is None else bias[begin : begin + count]
        begin += count
        if codebooks[at] == DENSE:
            found.append(functional.linear(x, own[0], added))
        else:
            q = matrix(own, x.shape[-1], codebooks[at], block_sizes[at])
            found.append(packed_product(x, q, added))
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


# Not `torch.library.custom_op`, whose detours cost more than a small product.
torch.library.define(
    "irq::served_linear",
    "(Tensor x, Tensor? bias, Tensor[] parts, int[] rows, int[] codebooks, int[] block_sizes)"
    " -> Tensor",
)
torch.library.impl("irq::served_linear", ("cpu", "cuda"))(served_linear)


@torch.library.register_fake("irq::served_linear")
def _fake(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    parts: list[torch.Tensor],
    rows: list[int],
    codebooks: list[int],
    block_sizes: list[int],
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(rows))
