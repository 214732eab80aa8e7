"""What is in the files against what the model needs, from headers alone, before anything loads.

transformers fills what is missing with noise and drops what it does not know, with a warning. Here
each quantized layer has all its parts in the right shape and dtype, or loading stops.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from irq_convert.artifact.config import (
    PART_SUFFIXES,
    ModuleFormat,
    QuantizationConfig,
    module_name,
)
from irq_convert.checkpoint.header import TensorInfo, read_header
from irq_convert.errors import IrqError
from irq_convert.hf.names import keys_in_model, tied_keys
from irq_convert.nn.linear import part_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STORED = {"torch.uint8": "U8", "torch.float16": "F16", "torch.float32": "F32"}
_WAY_OUT = "the artifact is damaged or of another model: convert or download it again"


@dataclass(frozen=True)
class Swap:
    """A layer to be quantized: its name in the model, its tensor in the files, its format."""

    module: str
    tensor: str
    fmt: ModuleFormat


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """All tensors of the safetensors `files` by name; `IrqError` when a name appears twice."""
    found: dict[str, TensorInfo] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            continue
        for name, info in read_header(file).tensors.items():
            if name in found:
                raise IrqError(f"{name} is in both {found[name].shard} and {file}: {_WAY_OUT}")
            found[name] = info
    return found


def plan_swaps(
    model: PreTrainedModel, config: QuantizationConfig, tensors: dict[str, TensorInfo]
) -> list[Swap]:
    """The layers of `model` (still dense, on meta) that the files hold quantized.

    Raises `IrqError` in one line, naming tensor, shape found and shape wanted, when a part is
    missing, superfluous or of another shape or dtype, when a layer has no tensor, when the
    configuration contradicts the files, and when a quantized tensor belongs to no layer.
    """
    stems = {name for tensor in tensors for name in (tensor, _stem(tensor))}
    sources = {key: stem for stem, key in sorted(keys_in_model(model, stems).items())}
    tied = tied_keys(model)
    swaps = []
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if type(module) is not nn.Linear or key in tied:
            continue
        tensor = sources.get(key)
        if tensor is None:
            if _is_needed(model, key):
                raise IrqError(f"the files hold no {key}, which the model needs: {_WAY_OUT}")
        elif _is_quantized(tensor, config, tensors):
            fmt = config.module(module_name(tensor))
            _check_parts(tensor, module, fmt, tensors)
            swaps.append(Swap(name, tensor, fmt))
    _check_all_taken(model, {swap.tensor for swap in swaps}, tensors)
    return swaps


def check_names(model: PreTrainedModel, swaps: list[Swap], tensors: dict[str, TensorInfo]) -> None:
    """Raise `IrqError` unless transformers will load each part where the swapped layer has it."""
    wanted = {
        swap.tensor + suffix: f"{swap.module}.weight{suffix}"
        for swap in swaps
        for suffix in ("", *PART_SUFFIXES)
        if swap.tensor + suffix in tensors
    }
    found = keys_in_model(model, wanted)
    for tensor, key in wanted.items():
        if found.get(tensor) != key:
            raise IrqError(
                f"this version of transformers would load {tensor} as {found.get(tensor)}, not as "
                f"{key}: use a version that irq-convert supports"
            )


def _stem(tensor: str) -> str:
    for suffix in sorted(PART_SUFFIXES, key=len, reverse=True):
        if tensor.endswith(suffix):
            return tensor.removesuffix(suffix)
    return tensor


def _is_needed(model: PreTrainedModel, key: str) -> bool:
    """Whether `key` must come from the files; a head that the checkpoint never had need not."""
    return type(model).__name__ in (model.config.architectures or ()) or _in_base(model, key)


def _in_base(model: PreTrainedModel, key: str) -> bool:
    prefix = model.base_model_prefix
    if not prefix or not hasattr(model, prefix):  # the model is the base model itself
        return True
    return key.startswith(f"{prefix}.")


def _is_quantized(tensor: str, config: QuantizationConfig, tensors: dict[str, TensorInfo]) -> bool:
    """Whether a layer's tensor is quantized, as configuration and files have to agree."""
    dense = module_name(tensor) in config.modules_to_not_convert
    parts = [tensor + suffix for suffix in PART_SUFFIXES if tensor + suffix in tensors]
    if dense and parts:
        raise IrqError(
            f"{parts[0]} is in the files, but modules_to_not_convert names "
            f"{module_name(tensor)}: {_WAY_OUT}"
        )
    if not dense and not parts and tensor in tensors:
        info = tensors[tensor]
        raise IrqError(
            f"{tensor} is {info.dtype} {list(info.shape)} without {tensor}_scale, but "
            f"modules_to_not_convert does not name {module_name(tensor)}: {_WAY_OUT}"
        )
    return not dense


def _check_parts(
    tensor: str, module: nn.Linear, fmt: ModuleFormat, tensors: dict[str, TensorInfo]
) -> None:
    rows, cols = module.out_features, module.in_features
    what = f"{fmt.codebook} in blocks of {fmt.block_size} for a layer [{rows}, {cols}]"
    wanted = {
        tensor + name.removeprefix("weight"): part
        for name, part in part_shapes(rows, cols, fmt).items()
    }
    for name, (shape, dtype) in wanted.items():
        need = f"{_STORED[str(dtype)]} {list(shape)}"
        info = tensors.get(name)
        if info is None:
            raise IrqError(f"the files hold no {name}, {what} needs it as {need}: {_WAY_OUT}")
        found = f"{info.dtype} {list(info.shape)}"
        if found != need:
            raise IrqError(f"{info.shard}: {name} is {found}, {what} needs {need}: {_WAY_OUT}")
    columns = fmt.columns_of(tensors[tensor].shape[-1])
    if columns != cols:
        raise IrqError(
            f"{tensor} has {columns} columns by quantization_config, the layer has {cols}: "
            f"{_WAY_OUT}"
        )
    for suffix in PART_SUFFIXES:
        if tensor + suffix in tensors and tensor + suffix not in wanted:
            raise IrqError(f"{tensor + suffix} is in the files, {what} has none: {_WAY_OUT}")


def _check_all_taken(
    model: PreTrainedModel, taken: set[str], tensors: dict[str, TensorInfo]
) -> None:
    """Refuse quantized tensors that no layer takes, but for those the model class is to drop."""
    dropped = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    whole = type(model).__name__ in (model.config.architectures or ())
    prefix = f"{model.base_model_prefix}."
    for tensor, info in tensors.items():
        if f"{tensor}_scale" not in tensors or f"{tensor}_tau" not in tensors or tensor in taken:
            continue
        head = not whole and not tensor.startswith(prefix)
        if head or any(pattern.search(tensor) for pattern in dropped):
            continue
        raise IrqError(
            f"{info.shard}: the quantized tensor {tensor} {list(info.shape)} belongs to no linear "
            f"layer of {type(model).__name__}: convert the model again with this tensor left dense"
        )
