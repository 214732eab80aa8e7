"""Tensors as bytes: the safetensors dtype names in torch's terms, and views without copies."""

import torch

from irq_convert.errors import IrqError

_TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
for _name, _attribute in (("F8_E8M0", "float8_e8m0fnu"), ("F4", "float4_e2m1fn_x2")):
    if hasattr(torch, _attribute):  # newer than the oldest torch supported
        _TORCH_DTYPES[_name] = getattr(torch, _attribute)
_SAFETENSORS_DTYPES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for the safetensors dtype `name`.

    "F4" is torch's `float4_e2m1fn_x2`, two elements an item. Raises `IrqError` for the dtypes torch
    does not have (the two F6), which can only be copied as bytes.
    """
    if name not in _TORCH_DTYPES:
        raise IrqError(
            f"dtype {name} has no counterpart in torch {torch.__version__}; it can only be copied"
        )
    return _TORCH_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype; `IrqError` when the format has none."""
    if dtype not in _SAFETENSORS_DTYPES:
        raise IrqError(f"{dtype} has no counterpart in safetensors; convert the tensor first")
    return _SAFETENSORS_DTYPES[dtype]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as a writable view of bytes, without a copy.

    Raises `ValueError` for a tensor that is not contiguous or not on the CPU.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("a contiguous CPU tensor is needed")
    if tensor.numel() == 0:
        return memoryview(bytearray())
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # strides of size 1 may be anything
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
