"""Experts of a mixture: which weights of a model are stacks of matrices, and what files call them.

transformers keeps the experts of a layer in one three-dimensional parameter, while many files hold
a tensor for each of them, which it stacks as it loads (`gate_proj` and `up_proj` of all experts
into `gate_up_proj`). Both layouts are found here, for classes whose forward uses its weights one
expert at a time (`forwards.py`); anything else is left dense, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from irq_convert.hf.expert_layouts import InFiles, Shape, StackedWeight, lay_out
from irq_convert.hf.forwards import orientation
from irq_convert.hf.names import Place, places

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Experts:
    """`found`: by state-dict key. `unknown`: tensors of experts that cannot be packed, and why.

    `missing`: keys for which the files have nothing.
    """

    found: Mapping[str, InFiles] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)
    missing: frozenset[str] = frozenset()


def find_experts(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> Experts:
    """Lay tensors of the files, by name and shape, beside the experts of `model` (on meta)."""
    weights, foreign = _stacked_weights(model)
    found: dict[str, InFiles] = {}
    unknown: dict[str, str] = {}
    merged: dict[str, list[Place]] = {}
    for place in places(model, shapes):
        if place.key in weights:
            merged.setdefault(place.key, []).append(place)
        elif place.key in foreign:
            unknown[place.tensor] = foreign[place.key]
        elif place.converter is not None:
            unknown[place.tensor] = "transformers converts them while loading"
    for key, group in merged.items():
        result = lay_out(weights[key], group, shapes)
        if isinstance(result, str):
            unknown |= dict.fromkeys((place.tensor for place in group), result)
        else:
            found[key] = result
    return Experts(found, unknown, frozenset(weights) - frozenset(merged))


def _stacked_weights(model: nn.Module) -> tuple[dict[str, StackedWeight], dict[str, str]]:
    """Stacked weights of known classes by state-dict key, and those of classes not known."""
    known: dict[str, StackedWeight] = {}
    foreign: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for parameter, value in module.named_parameters(recurse=False):
            key = f"{name}.{parameter}" if name else parameter
            if "expert" not in f"{key} {type(module).__name__}".lower():
                continue
            if value.dim() == 3 and value.is_floating_point():
                cls: Any = type(module)
                transposed = orientation(cls, parameter)
                if transposed is None:
                    foreign[key] = f"the class {type(module).__name__} cannot compute packed ones"
                else:
                    shape = tuple(value.shape)
                    known[key] = StackedWeight(name, parameter, shape, transposed)
    return known, foreign
