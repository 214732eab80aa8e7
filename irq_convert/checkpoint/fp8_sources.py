"""Which tensors of an FP8 source are weights, which are their scales, and which are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.fp8 import FP8_DTYPES, Block, decode_fp8
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.packed import is_narrow_float
from irq_convert.errors import IrqError

_TRANSFORMERS_BLOCK = (128, 128)
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_SCALES = ("_scale_inv", "_scale")
_OF_WEIGHTS = re.compile(r"(\.weight|_proj)_scale(_inv)?$|_scale_inv$")
_OF_ACTIVATIONS = re.compile(
    r"[._](input_scale|input_scale_ub|input_zero_point|activation_scale|act_scale|qscale_act)$"
)
_OF_CACHE = re.compile(r"\.([kvq]_scale|kv_scale|(k|v|kv|qkv)_proj\.output_scale)$")
_OTHERWISE_PACKED = re.compile(r"(\.weight_(packed|global_scale|shape|zero_point|g_idx|scale_2))$")
ACTIVATIONS = "a scale of the activations in FP8, which a dense model does not need"
CACHE = "a scale of the key-value cache in FP8, which a dense model does not need"


@dataclass(frozen=True)
class Fp8Reading:
    """How the weights of a method are read.

    `block` is the size of blocks that the setting tells. `cache`: whether scales of the cache may
    have any shape. `stacks_of_columns`: stacks have a scale for each column, whichever way it lies.
    """

    block: Block | None
    cache: bool = False
    stacks_of_columns: bool = False


def fp8_reading(setting: Mapping[str, Any]) -> Fp8Reading | None:
    """How to read a source of this `quantization_config`; None where it is not plain FP8."""
    method, cache = setting.get("quant_method"), bool(setting.get("kv_cache_scheme"))
    if method == "fp8" and setting.get("expert_dtype", "fp8") == "fp8":
        block = setting.get("weight_block_size", _TRANSFORMERS_BLOCK)
        return Fp8Reading(_block(block), cache) if block is None or _block(block) else None
    if method == "fbgemm_fp8":
        return Fp8Reading(None, stacks_of_columns=True)
    if method == "modelopt":
        inner = setting.get("quantization")
        inner = inner if isinstance(inner, dict) else setting
        return Fp8Reading(None, True) if inner.get("quant_algo") in _MODELOPT else None
    if method == "compressed-tensors":
        return _compressed_tensors(setting, cache)
    return None


def _block(value: object) -> Block | None:
    if isinstance(value, list | tuple) and len(value) == 2:
        rows, cols = value
        if isinstance(rows, int) and isinstance(cols, int) and rows > 0 and cols > 0:
            return rows, cols
    return None


def _compressed_tensors(setting: Mapping[str, Any], cache: bool) -> Fp8Reading | None:
    """FP8 in all groups, alike in their blocks; no sparsity, no rotation."""
    groups, sparsity = setting.get("config_groups"), setting.get("sparsity_config") or {}
    if not isinstance(groups, dict) or not groups or setting.get("transform_config"):
        return None
    if sparsity.get("format", "dense") != "dense":
        return None
    blocks = set()
    for group in groups.values():
        weights = (group.get("weights") if isinstance(group, dict) else None) or {}
        packing = group.get("format") or setting.get("format") if weights else None
        if packing not in _FLOAT_FORMATS or weights.get("type") != "float":
            return None
        if weights.get("num_bits") != 8 or not weights.get("symmetric", True):
            return None
        size, strategy = weights.get("group_size"), weights.get("strategy")
        if strategy == "block":
            blocks.add(_block(weights.get("block_structure")))
        elif strategy == "group":
            blocks.add(_block((1, size)))
    return Fp8Reading(blocks.pop() if blocks else None, cache) if len(blocks) < 2 else None


def decode_fp8_source(
    tensors: Mapping[str, TensorInfo], reading: Fp8Reading, dtype: str
) -> tuple[dict[str, TensorInfo], tuple[tuple[str, str], ...]] | None:
    """`tensors` with dense weights in `dtype`, and what is left out with the reason.

    None where there is no FP8 weight, or something is packed in another way besides. Raises
    `IrqError` where a scale is missing, without its weight, or of a shape that does not fit.
    """
    weights = {name: info for name, info in tensors.items() if _is_weight(info)}
    if not weights or any(_is_packed_otherwise(info) for info in tensors.values()):
        return None
    scales = {name: _scale_of(info, tensors) for name, info in weights.items()}
    consumed = {scale.name for scale in scales.values()}
    found, dropped = {}, []
    for name, info in tensors.items():
        if name in weights:
            scale = _turned(info, scales[name]) if reading.stacks_of_columns else scales[name]
            found[name] = decode_fp8(info, scale, reading.block, dtype)
        elif name not in consumed:
            reason = _why_dropped(info, weights, reading)
            if reason is None:
                _refuse_lone_scale(info)
                found[name] = info
            else:
                dropped.append((name, reason))
    return found, tuple(dropped)


def _is_weight(info: TensorInfo) -> bool:
    return info.dtype in FP8_DTYPES


def _is_packed_otherwise(info: TensorInfo) -> bool:
    """Integers or four bits for a weight, or a part that plain FP8 does not have."""
    if _OTHERWISE_PACKED.search(info.name):
        return True
    if is_narrow_float(info.dtype):
        return info.dtype not in (*FP8_DTYPES, "F8_E8M0")
    return info.dtype not in FLOATS and info.name.endswith(
        (".weight", ".qweight", "_proj", "_blocks")
    )


def _scale_of(weight: TensorInfo, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    names = [weight.name + suffix for suffix in _SCALES]
    stem = weight.name.removesuffix(".weight")
    if stem != weight.name:
        names += [stem + ".qscale_weight", stem + ".scale"]
    for name in names:
        if name in tensors:
            return tensors[name]
    raise IrqError(
        f"{weight.shard}: {weight.name} {list(weight.shape)} is {weight.dtype} and means nothing "
        f"without its scale, and neither {names[0]} nor {names[1]} is in any file: get all files "
        "of the release"
    )


def _turned(weight: TensorInfo, scale: TensorInfo) -> TensorInfo:
    """The scales of a stack's columns as the rows that they are to be multiplied with."""
    if len(weight.shape) == 3 and scale.shape == (weight.shape[0], weight.shape[2], 1):
        return replace(scale, shape=(weight.shape[0], 1, weight.shape[2]))
    return scale


def _why_dropped(
    info: TensorInfo, weights: Mapping[str, TensorInfo], reading: Fp8Reading
) -> str | None:
    found = _OF_ACTIVATIONS.search(info.name)
    if found and len(info.shape) < 2:
        stem = info.name[: found.start()]
        return ACTIVATIONS if stem in weights or f"{stem}.weight" in weights else None
    if _OF_CACHE.search(info.name) and (info.numel == 1 or reading.cache):
        return CACHE
    return None


def _refuse_lone_scale(info: TensorInfo) -> None:
    found = _OF_WEIGHTS.search(info.name)
    if not found and info.dtype != "F8_E8M0":
        return
    raise IrqError(
        f"{info.shard}: {info.name} {list(info.shape)} is a scale of FP8, and no tensor of F8_E4M3 "
        "or F8_E5M2 is there that it belongs to: get all files of one release"
    )
