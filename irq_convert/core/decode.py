"""`y = x W^T + b` of a quantized matrix, for whoever runs a model: no gradient is kept.

One function for any number of tokens.
"""

from __future__ import annotations

import torch

from irq_convert.core.product import tiled_product
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.errors import UsageError


def packed_product(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ W^T + bias`, with `W` `[rows, cols]` the matrix that `q` stands for; without a gradient.

    `x` floating `[..., cols]` of any dtype that `dequantize_tensor` knows, `bias` `[rows]` of the
    same dtype, all on the device of `q`. Returns `[..., rows]` in the dtype of `x`. Raises
    `UsageError` where `x` or `bias` has another shape, dtype or device, `IrqError` when the parts
    of `q` do not fit together.
    """
    rows = q.codes.shape[0]
    if not x.is_floating_point() or x.shape[-1:] != (q.cols,) or x.device != q.codes.device:
        raise UsageError(
            f"an input of {x.dtype} {list(x.shape)} on {x.device} does not go with a matrix "
            f"{[rows, q.cols]} on {q.codes.device}: it must be floating [..., {q.cols}] there"
        )
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
        raise UsageError(f"bias is {bias.dtype} {list(bias.shape)}: it must be {x.dtype} {[rows]}")
    with torch.no_grad():
        return tiled_product(x, q, bias)
