"""Numbers in another floating dtype, where what is finite has to stay so."""

from __future__ import annotations

import torch

from irq_convert.checkpoint.buffers import tensor_bytes, torch_dtype
from irq_convert.errors import IrqError


def narrow(values: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """`values` rounded to the safetensors `dtype`, contiguous.

    Raises `IrqError`, naming the tensor `name`, when a finite number becomes infinite or NaN.
    """
    result = values.to(torch_dtype(dtype)).contiguous()
    lost = ~result.isfinite() & values.isfinite()
    if bool(lost.any()):
        largest, word = float(values[lost].abs().max()), str(result.dtype).removeprefix("torch.")
        raise IrqError(
            f"{name}: holds {largest:.6g}, which is too large for {word}: choose --dtype bfloat16 "
            "or float32"
        )
    return result


def cast_bytes(
    data: bytes, at: int, source: str, target: str, name: str
) -> tuple[memoryview | bytes, int]:
    """Bytes of a tensor of dtype `source` from byte `at` on, as they are in dtype `target`.

    Returns them with the byte that they begin at. `data` holds whole elements. Raises as `narrow`.
    """
    if not data or source == target:
        return data, at
    dtype = torch_dtype(source)
    result = narrow(torch.frombuffer(bytearray(data), dtype=dtype), target, name)
    return tensor_bytes(result), at // dtype.itemsize * result.element_size()
