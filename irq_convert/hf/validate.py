"""What is in the files against what the model needs, from headers alone, before anything loads.

transformers fills what is missing with noise and drops what it does not know, with a warning. Here
each quantized layer has all its parts in the right shape and dtype, or loading stops.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from irq_convert.artifact.config import (
    PART_SUFFIXES,
    ModuleFormat,
    QuantizationConfig,
    module_name,
)
from irq_convert.artifact.structure import swapped
from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.header import TensorInfo, read_header
from irq_convert.core.scales import statistic_dtype
from irq_convert.errors import IrqError
from irq_convert.hf.conversions import Adjusted
from irq_convert.hf.experts import Experts, find_experts
from irq_convert.hf.names import keys_in_model
from irq_convert.hf.swap import Child, ExpertsSwap, Swap, Swaps, layer_shape
from irq_convert.hf.tables import check_tied, is_table
from irq_convert.hf.tied import tied_groups, untie_stored
from irq_convert.nn.experts import Separate, Stacked, stack_parts
from irq_convert.nn.packed import layer_parts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_WAY_OUT = "the artifact is damaged or of another model: convert or download it again"


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
) -> Swaps:
    """The layers of `model` (still dense, on meta) that the files hold quantized.

    What `model` ties and the files have twice, one of them quantized, it does not tie from now on.
    Raises `IrqError` in one line, naming tensor, shape found and shape wanted, when a part is
    missing, superfluous or of another shape or dtype, when a layer has no tensor, when the
    configuration contradicts the files, and when a quantized tensor belongs to no layer.
    """
    linears = tuple(_linear_swaps(model, config, tensors))
    shapes = {
        name: _source_shape(name, config, tensors)
        for name in tensors
        if not name.endswith(PART_SUFFIXES)
    }
    experts = find_experts(model, shapes)
    swaps = Swaps(linears, tuple(_expert_swaps(experts, config, tensors)))
    for key in sorted(experts.missing):
        if _is_needed(model, key):
            raise IrqError(f"the files hold no {key}, which the model needs: {_WAY_OUT}")
    _check_all_taken(model, {tensor for tensor, _ in swaps.packed()}, tensors, experts.unknown)
    return swaps


def _linear_swaps(
    model: PreTrainedModel, config: QuantizationConfig, tensors: dict[str, TensorInfo]
) -> Iterator[Swap]:
    stems = {name for tensor in tensors for name in (tensor, _stem(tensor))}
    sources = {key: stem for stem, key in sorted(keys_in_model(model, stems).items())}
    packed = {tensor for tensor in sources.values() if f"{tensor}_scale" in tensors}
    untie_stored(model, sources, packed)
    groups = tied_groups(model)
    for name, module in model.named_modules():
        key = f"{name}.weight"
        linear = type(module) in (nn.Linear, Conv1D)
        tied = next((group for group in groups if key in group), frozenset())
        tensor = sources.get(key)
        if not (linear or is_table(module)):
            continue
        if (tied or not linear) and (tensor is None or tensor not in packed):
            continue  # dense, or the weight of another module
        if tensor is None:
            if _is_needed(model, key):
                raise IrqError(f"the files hold no {key}, which the model needs: {_WAY_OUT}")
        elif _is_quantized(tensor, config, tensors):
            fmt = config.module(module_name(tensor))
            _check_turned(tensor, fmt, type(module) is Conv1D)
            rows, cols = layer_shape(module)
            _check_parts(tensor, layer_parts(rows, cols, fmt), (rows, cols), fmt, tensors)
            others = tuple(sorted(module_name(other) for other in tied - {key}))
            check_tied(model, tensor, others, {sources.get(other) for other in tied - {key}})
            yield Swap(name, tensor, fmt, others)


def _expert_swaps(
    experts: Experts, config: QuantizationConfig, tensors: dict[str, TensorInfo]
) -> Iterable[ExpertsSwap]:
    swaps: dict[str, ExpertsSwap] = {}
    for found in experts.found.values():
        quantized = {t: _is_quantized_expert(t, config, tensors) for t in found.tensors}
        if not any(quantized.values()):
            continue
        weight = found.weight
        swap = swaps.setdefault(weight.module, ExpertsSwap(weight.module))
        if found.whole is not None:
            fmt = config.module(module_name(found.whole))
            _check_turned(found.whole, fmt, found.transposed)
            layout = Stacked(fmt, weight.shape[0], weight.rows, weight.cols, weight.transposed)
            shape = (weight.shape[0], weight.rows, weight.cols)
            _check_parts(found.whole, stack_parts("weight", layout), shape, fmt, tensors)
            swap.layouts[weight.parameter] = layout
            swap.stacks[weight.parameter] = found.whole
            continue
        for part in (part for expert in found.parts for part in expert):
            own = config.module(module_name(part.tensor)) if quantized[part.tensor] else None
            if own is not None:
                _check_turned(part.tensor, own, False)
                parts = layer_parts(part.rows, weight.cols, own)
                _check_parts(part.tensor, parts, (part.rows, weight.cols), own, tensors)
            swap.children[part.child] = Child(part.tensor, part.rows, weight.cols, own)
        names = tuple(tuple(part.child for part in expert) for expert in found.parts)
        swap.layouts[weight.parameter] = Separate(names, weight.rows, weight.cols)
    return swaps.values()


def check_loaded_names(
    model: PreTrainedModel, swaps: Swaps, tensors: dict[str, TensorInfo]
) -> Adjusted:
    """What transformers' rules need so that each part is loaded where the swapped layer has it.

    Raises `IrqError` where it would be loaded elsewhere all the same.
    """
    wanted = swaps.keys(tensors)
    spared = Adjusted(swaps.spared(tensors), model.base_model_prefix)
    found = keys_in_model(model, wanted, spared)
    moved = {
        tensor: key
        for tensor, key in wanted.items()
        if found.get(tensor) != key and tensor.endswith(PART_SUFFIXES)
    }
    adjusted = replace(spared, parts=moved)
    if moved:
        found = keys_in_model(model, wanted, adjusted)
    for tensor, key in wanted.items():
        if found.get(tensor) != key:
            raise IrqError(
                f"this version of transformers would load {tensor} as {found.get(tensor)}, not as "
                f"{key}: use a version that irq-convert supports"
            )
    return adjusted


def _source_shape(
    tensor: str, config: QuantizationConfig, tensors: dict[str, TensorInfo]
) -> tuple[int, ...]:
    """The shape that a tensor had before it was quantized, by its codes and its format."""
    shape = tensors[tensor].shape
    if f"{tensor}_scale" not in tensors or not shape:
        return shape
    fmt = config.module(module_name(tensor))
    stored = (*shape[:-1], fmt.columns_of(shape[-1]))
    return swapped(stored) if fmt.transposed and len(stored) > 1 else stored


def _check_turned(tensor: str, fmt: ModuleFormat, wanted: bool) -> None:
    if fmt.transposed != wanted:
        said, needs = ("is", "the layer is not") if fmt.transposed else ("is not", "the layer is")
        raise IrqError(
            f"{tensor} {said} transposed by quantization_config, but {needs}: {_WAY_OUT}"
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
    dense = module_name(tensor) in config.dense_modules
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


def _is_quantized_expert(
    tensor: str, config: QuantizationConfig, tensors: dict[str, TensorInfo]
) -> bool:
    """Whether a tensor of experts is quantized; a dense one need not be listed, but be floats."""
    if any(tensor + suffix in tensors for suffix in PART_SUFFIXES):
        return _is_quantized(tensor, config, tensors)
    info = tensors[tensor]
    if info.dtype not in FLOATS:
        raise IrqError(
            f"{tensor} is {info.dtype} {list(info.shape)} without {tensor}_scale: {_WAY_OUT}"
        )
    return False


def _check_parts(
    tensor: str,
    parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    layer: tuple[int, ...],
    fmt: ModuleFormat,
    tensors: dict[str, TensorInfo],
) -> None:
    """`parts` by the names of a layer `[..., rows, cols]` against what the files have."""
    what = f"{fmt.codebook} in blocks of {fmt.block_size} for a layer {list(layer)}"
    wanted = {tensor + name.removeprefix("weight"): part for name, part in parts.items()}
    for name, (shape, dtype) in wanted.items():
        need = f"{statistic_dtype(dtype).safetensors} {list(shape)}"
        info = tensors.get(name)
        if info is None:
            raise IrqError(f"the files hold no {name}, {what} needs it as {need}: {_WAY_OUT}")
        found = f"{info.dtype} {list(info.shape)}"
        if found != need:
            raise IrqError(f"{info.shard}: {name} is {found}, {what} needs {need}: {_WAY_OUT}")
    columns = fmt.columns_of(tensors[tensor].shape[-1])
    if columns != layer[-1]:
        raise IrqError(
            f"{tensor} has {columns} columns by quantization_config, the layer has {layer[-1]}: "
            f"{_WAY_OUT}"
        )
    for suffix in PART_SUFFIXES:
        if tensor + suffix in tensors and tensor + suffix not in wanted:
            raise IrqError(f"{tensor + suffix} is in the files, {what} has none: {_WAY_OUT}")


def _check_all_taken(
    model: PreTrainedModel,
    taken: set[str],
    tensors: dict[str, TensorInfo],
    unknown: Mapping[str, str],
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
        if tensor in unknown:
            raise IrqError(
                f"{info.shard}: the quantized tensor {tensor} {list(info.shape)} cannot be loaded "
                f"({unknown[tensor]}): {_WAY_OUT}"
            )
        raise IrqError(
            f"{info.shard}: the quantized tensor {tensor} {list(info.shape)} belongs to no linear "
            f"layer of {type(model).__name__}: convert the model again with this tensor left dense"
        )
