"""Tensors that are quantized already, told by name and dtype: which method wrote them.

Only pairs that belong together are taken for a sign, since one name alone proves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from irq_convert.checkpoint.header import TensorInfo

_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_EIGHT_BIT_FLOATS = re.compile(r"F8_|F[46]_")


@dataclass(frozen=True)
class PackedTensor:
    """A tensor that is packed, and the `method` that packs so, in words."""

    info: TensorInfo
    method: str


@dataclass(frozen=True)
class _Sign:
    """A tensor called stem + `suffix` beside stem + one of `beside`, in one of `dtypes`."""

    method: str
    suffix: str
    beside: tuple[str, ...]
    dtypes: Callable[[str], bool]


def is_narrow_float(dtype: str) -> bool:
    """Whether a dtype of safetensors is a float of 8 bits or less, which needs scales elsewhere."""
    return bool(_EIGHT_BIT_FLOATS.match(dtype))


def _is_integer(dtype: str) -> bool:
    return dtype in _INTEGERS


def _is_any_packed(dtype: str) -> bool:
    return _is_integer(dtype) or is_narrow_float(dtype)


_SIGNS = (
    _Sign("irq", "", ("_tau",), lambda dtype: dtype == "U8"),
    _Sign("GPTQ", ".qweight", (".g_idx",), _is_integer),
    _Sign("AWQ or GPTQ", ".qweight", (".qzeros", ".scales"), _is_integer),
    _Sign("MXFP4", "_blocks", ("_scales",), _is_integer),
    _Sign("NVFP4", ".weight", (".weight_scale_2",), _is_integer),
    _Sign("NVFP4", ".weight_packed", (".weight_global_scale",), _is_integer),
    _Sign("compressed-tensors", ".weight_packed", (".weight_scale", ".weight_shape"), _is_integer),
    _Sign("bitsandbytes in 8 bits", ".weight", (".SCB",), _is_integer),
    _Sign(
        "bitsandbytes in 4 bits",
        ".weight",
        (".weight.absmax", ".weight.quant_map", ".absmax"),
        _is_integer,
    ),
    _Sign("MLX", ".weight", (".scales",), _is_integer),
    _Sign("HQQ", ".W_q", (".scale", ".meta", ".zero"), _is_any_packed),
    _Sign("quanto", ".weight._data", (".weight._scale",), _is_any_packed),
    _Sign("FP8", "", ("_scale_inv", "_scale"), is_narrow_float),
    _Sign("integers", ".weight", (".weight_scale", ".weight_scale_inv"), _is_integer),
)


def find_packed(tensors: Mapping[str, TensorInfo]) -> PackedTensor | None:
    """The first of `tensors` that is packed by a known method; None where none is."""
    for name, info in tensors.items():
        if not _is_any_packed(info.dtype):
            continue
        for sign in _SIGNS:
            stem = name.removesuffix(sign.suffix)
            if not name.endswith(sign.suffix) or not sign.dtypes(info.dtype):
                continue
            if any(stem + suffix in tensors for suffix in sign.beside):
                return PackedTensor(info, sign.method)
    return None


_NATIVE = re.compile(r"^layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123])\.weight$")


def find_native(tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The first of `tensors` with a name of Meta's or Mistral's own layout, beside params.json."""
    return next((info for name, info in tensors.items() if _NATIVE.match(name)), None)
