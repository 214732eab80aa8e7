"""`y = x W^T + b` of a quantized matrix, for whoever runs a model: no gradient is kept.

One function for any number of tokens. A few are multiplied with the packed weight itself: what a
step of decoding costs is then the reading of codes and statistics. More are multiplied with tiles
of dense rows (`product.py`), which cost as much whatever their number.
"""

from __future__ import annotations

import functools

import torch

from irq_convert.core import decode_cpu
from irq_convert.core.product import tiled_product
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import check_statistic
from irq_convert.core.triton.support import why_not
from irq_convert.core.working_dtype import working_dtype
from irq_convert.errors import IrqError, UsageError

MOST_TOKENS = {torch.bfloat16: 16, torch.float16: 8, torch.float32: 8}
"""More tokens than this, of a dtype, are multiplied with dense tiles on a CPU.

By tests/bench/decode.py. In bfloat16 sixteen cost what making the tiles costs alone, so whatever
multiplies with them.
"""
MOST_TOKENS_THROUGH_FLOAT32 = 32
"""The same in bfloat16 on a CPU without instructions for it (`working_dtype.py`)."""
MOST_TOKENS_ON_GPU = 4
"""The same on a GPU: a guess, not yet measured on one."""
CHECKED = "_checked_at"
"""Where the parts of a `QuantizedTensor` lay when they were found to fit together."""


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

    It does for up to `MOST_TOKENS` of its dtype on a CPU with AVX2 (`MOST_TOKENS_THROUGH_FLOAT32`
    where that is), and for up to `MOST_TOKENS_ON_GPU` on a GPU that Triton serves.
    """
    most = MOST_TOKENS.get(x.dtype, 0)
    if x.is_cpu:
        if most and x.dtype is torch.bfloat16 and working_dtype(x) is not x.dtype:
            most = MOST_TOKENS_THROUGH_FLOAT32
        return 0 < x.numel() <= most * q.cols and decode_cpu.usable()
    most = min(most, MOST_TOKENS_ON_GPU)
    return x.is_cuda and 0 < x.numel() <= most * q.cols and _triton_runs(x.device)


@functools.cache
def _triton_runs(device: torch.device) -> bool:
    return why_not(device) is None


def _check_parts(q: QuantizedTensor) -> None:
    """`q.check()`, dtypes of statistics and devices; once for a `q` whose parts do not move."""
    parts = (q.codes, q.scale, q.tau, q.scale_grid, q.tau_grid)
    places = [None if part is None else part.data_ptr() for part in parts]
    if q.__dict__.get(CHECKED) == places:
        return
    q.check()
    for stored, grid in ((q.scale, q.scale_grid), (q.tau, q.tau_grid)):
        check_statistic(stored, grid)
    if any(part is not None and part.device != q.codes.device for part in parts):
        raise UsageError("codes and statistics of a quantized matrix lie on several devices")
    if q.codes.dtype != torch.uint8:
        raise IrqError(f"packed codes are uint8, not {q.codes.dtype}")
    q.__dict__.setdefault(CHECKED, [])[:] = places
