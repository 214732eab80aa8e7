"""`y = x W^T + b` of a quantized matrix, for whoever runs a model: no gradient is kept.

One function for any number of tokens. A few are multiplied with the packed weight itself: what a
step of decoding costs is then the reading of codes and statistics. More are multiplied with tiles
of dense rows (`product.py`), which cost as much whatever their number.
"""

from __future__ import annotations

import functools

import torch

from irq_convert.core import decode_cpu
from irq_convert.core.blocks import BlockShape
from irq_convert.core.codebook import get_codebook
from irq_convert.core.parts import part_shapes
from irq_convert.core.product import tiled_product
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import check_statistic
from irq_convert.core.triton.support import why_not
from irq_convert.errors import UsageError

MOST_TOKENS = 8
"""More tokens than this are multiplied with dense tiles: where that is faster on a CPU, by
tests/bench/decode.py."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def packed_product(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ W^T + bias`, with `W` `[rows, cols]` the matrix that `q` stands for; without a gradient.

    `x` floating `[..., cols]` of any dtype that `dequantize_tensor` knows, `bias` `[rows]` of the
    same dtype, all on the device of `q`. Returns `[..., rows]` in the dtype of `x`: where `decodes`
    says so summed in float32 and rounded once, at least as near to the exact product as with a
    dense `W` in that dtype, and in bits that depend neither on other tokens nor on threads. Raises
    `UsageError` where `x` or `bias` has another shape, dtype or device, `IrqError` when the parts
    of `q` do not fit together.
    """
    _check(x, q, bias)
    if not decodes(x, q):
        with torch.no_grad():
            return tiled_product(x, q, bias)
    _check_parts(q)
    if not x.is_cpu:
        from irq_convert.core.triton.decode import decode_rows_triton

        y = decode_rows_triton(x.detach().reshape(-1, q.cols), q)
        y = y if bias is None else y + bias.detach()
        return y.to(x.dtype).view(*x.shape[:-1], len(q.codes))
    if x.dtype == torch.float16:
        wide = None if bias is None else bias.detach().float()
        return decode_cpu.decode_rows(x.detach().float(), q, wide).half()
    return decode_cpu.decode_rows(x, q, bias)


def _check(x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None) -> None:
    rows = q.codes.shape[0]
    if not x.is_floating_point() or x.shape[-1:] != (q.cols,) or x.device != q.codes.device:
        raise UsageError(
            f"an input of {x.dtype} {list(x.shape)} on {x.device} does not go with a matrix "
            f"{[rows, q.cols]} on {q.codes.device}: it must be floating [..., {q.cols}] there"
        )
    if bias is None:
        return
    if bias.shape != (rows,) or bias.dtype != x.dtype or bias.device != x.device:
        raise UsageError(
            f"bias is {bias.dtype} {list(bias.shape)} on {bias.device}: it must be {x.dtype} "
            f"{[rows]} on {x.device}"
        )


def decodes(x: torch.Tensor, q: QuantizedTensor) -> bool:
    """Whether a product with `x` `[..., cols]` reads packed weights, and writes no dense ones.

    It does for up to `MOST_TOKENS` tokens in float32, bfloat16 and float16, on a CPU with AVX2 and
    on a GPU that Triton serves.
    """
    if not 0 < x.numel() <= MOST_TOKENS * q.cols or x.dtype not in DTYPES:
        return False
    if x.is_cpu:
        return decode_cpu.usable()
    return x.is_cuda and _triton_runs(x.device)


@functools.cache
def _triton_runs(device: torch.device) -> bool:
    return why_not(device) is None


def _check_parts(q: QuantizedTensor) -> None:
    """`q.check()`, dtypes of statistics and devices; quick where all is well."""
    codes, scale, tau = q.codes, q.scale, q.tau
    wanted = _shapes(len(codes), q.cols, q.codebook, q.block_size)
    if (codes.shape, scale.shape, tau.shape) != wanted[:3] or codes.dtype != torch.uint8:
        q.check()
    for stored, grid in ((scale, q.scale_grid), (tau, q.tau_grid)):
        if (stored.dtype == torch.uint8) != (grid is not None) or not (
            grid is None or grid.dtype == torch.float32
        ):
            check_statistic(stored, grid)
        if grid is not None and grid.shape != wanted[3]:
            q.check()
        if stored.device != codes.device or (grid is not None and grid.device != codes.device):
            raise UsageError("codes and statistics of a quantized matrix lie on several devices")


@functools.lru_cache(1024)
def _shapes(rows: int, cols: int, codebook: str, block_size: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of codes, scale, tau and their grids."""
    shape = BlockShape(rows, cols, block_size, get_codebook(codebook).bits)
    return tuple(part_shapes(shape, (rows,)).values())
