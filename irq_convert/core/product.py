"""`y = x W^T + b` over tiles of dense rows: the product of training and of whole texts.

The dense weight exists a tile at a time. Every number of `y` is one product of torch with the dense
values in the dtype of `x`, rounded once. Where this CPU is no good at that dtype both go through
float32 (`working_dtype.py`). `decode.py` has the product that never makes dense values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from irq_convert.core.dequantize import dequantize_rows, dequantize_tensor
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.working_dtype import no_autocast, working_dtype

FEW_ROWS = 16
"""On a CPU inputs of at most this many rows use small tiles, which stay in its cache."""
SMALL_TILE = 1 << 21
LARGE_TILE = 1 << 24
"""Bytes of dense weights at a time.

On a CPU fresh memory costs more than filling it: below 32 MiB the allocator keeps what it had. On a
GPU a tile of this size stays in the second-level cache until it is multiplied.
"""


def tiled_product(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ W^T + bias` with `W` the dense values of `q` in the dtype of `x`.

    `x` floating `[..., cols]`, `bias` `[rows]` of the same dtype; returns `[..., rows]`.
    """
    wide = working_dtype(x)
    if wide is x.dtype:
        return _product(x, q, bias, x.dtype)
    with no_autocast():
        added = None if bias is None else bias.to(wide)
        return _product(x.to(wide), q, added, x.dtype).to(x.dtype)


def _product(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`x @ W^T + bias` in the dtype of `x`, the values of `W` being of `dtype`."""
    few = x.is_cpu and x.numel() <= FEW_ROWS * q.cols
    tiles = _tiles(x, q, dtype, SMALL_TILE if few else LARGE_TILE)
    if tiles is None:
        return functional.linear(x, dequantize_tensor(q, dtype).to(x.dtype), bias)
    y = x.new_empty(*x.shape[:-1], q.codes.shape[0])
    for begin, end, weight in tiles:
        part = None if bias is None else bias[begin:end]
        y[..., begin:end] = functional.linear(x, weight.to(x.dtype), part)
    return y


def _tiles(
    like: torch.Tensor, q: QuantizedTensor, dtype: torch.dtype, tile_bytes: int
) -> Iterator[tuple[int, int, torch.Tensor]] | None:
    """Dense rows `begin .. end` of `q` in `dtype`, all in one buffer; None for one.

    In the dtype of `like` they have at most `tile_bytes`.
    """
    rows = q.codes.shape[0]
    step = max(1, tile_bytes // max(1, q.cols * like.element_size()))
    if rows <= step:
        return None
    buffer = like.new_empty(step, q.cols, dtype=dtype)

    def walk() -> Iterator[tuple[int, int, torch.Tensor]]:
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            yield begin, end, dequantize_rows(q, begin, end, dtype, out=buffer[: end - begin])

    return walk()
