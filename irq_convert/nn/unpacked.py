"""Packed experts made dense again, in their own class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from irq_convert.core.dequantize import dequantize_rows
from irq_convert.nn.experts import IrqExperts, Separate, Stacked, dense_class
from irq_convert.nn.linear import IrqLinear


def unpack_experts(module: IrqExperts, dtype: torch.dtype) -> None:
    """Give `module` back its class and dense parameters in `dtype`, one expert at a time."""
    dense: dict[str, torch.Tensor] = {}
    for name, layout in module.packed.items():
        device = next(module.parameters()).device
        experts = layout.experts if isinstance(layout, Stacked) else len(layout.children)
        weight = torch.empty(experts, layout.rows, layout.cols, dtype=dtype, device=device)
        for number, rows in enumerate(weight):
            if isinstance(layout, Stacked):
                q = module.quantized(name, number)
                dequantize_rows(q, 0, layout.rows, dtype, out=rows)
            else:
                parts = [_dense_rows(module, child, dtype) for child in layout.children[number]]
                torch.cat(parts, out=rows)
        flip = isinstance(layout, Stacked) and layout.transposed
        dense[name] = weight.transpose(1, 2).contiguous() if flip else weight
    for part in module.packed_parts():
        del module._parameters[part]
    for layout in module.packed.values():
        if isinstance(layout, Separate):
            for child in {child.split(".")[0] for names in layout.children for child in names}:
                module._modules.pop(child, None)
    cls: Any = dense_class(type(module))
    module.__class__ = cls
    for left in ("packed", "moved", "labels", "dense_dtype"):
        delattr(module, left)
    for name, weight in dense.items():
        module.register_parameter(name, nn.Parameter(weight))


def _dense_rows(module: nn.Module, child: str, dtype: torch.dtype) -> torch.Tensor:
    layer = module.get_submodule(child)
    if isinstance(layer, IrqLinear):
        return layer.dequantize(dtype)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().to(dtype)
