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
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
)

from irq_convert.hf.forwards import orientation
from irq_convert.hf.names import Place, places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StackedWeight:
    """A parameter of a class of experts, `[experts, ., .]`.

    `transposed`: the class multiplies `x @ weight[e]`, so that it is `[experts, inputs, outputs]`.
    """

    module: str
    parameter: str
    shape: Shape
    transposed: bool

    @property
    def rows(self) -> int:
        """Outputs of one expert."""
        return self.shape[2 if self.transposed else 1]

    @property
    def cols(self) -> int:
        """Inputs of one expert."""
        return self.shape[1 if self.transposed else 2]


@dataclass(frozen=True)
class ExpertPart:
    """A tensor of the files that holds rows of one expert; `child` is its module's name here."""

    tensor: str
    child: str
    rows: int


@dataclass(frozen=True)
class InFiles:
    """How the files hold one stacked weight: as `whole`, or in `parts` by expert.

    `transposed`: the whole tensor is `[experts, inputs, outputs]`, whatever the class has.
    """

    weight: StackedWeight
    whole: str | None = None
    transposed: bool = False
    parts: tuple[tuple[ExpertPart, ...], ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """All its tensors."""
        if self.whole is not None:
            return (self.whole,)
        return tuple(part.tensor for expert in self.parts for part in expert)


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
        result = _in_files(weights[key], group, shapes)
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


def _in_files(
    weight: StackedWeight, group: list[Place], shapes: Mapping[str, Shape]
) -> InFiles | str:
    """How the tensors `group` make up `weight`, or why that is not understood."""
    converter = group[0].converter
    if converter is None or not _separate(converter):
        if len(group) != 1:
            return "several tensors stand for one weight"
        return _whole(weight, group[0].tensor, converter, shapes[group[0].tensor])
    if weight.transposed:
        return "transformers stacks them for a class that has them transposed"
    columns: dict[str, list[Place]] = {source: [] for source in converter.source_patterns}
    for place in sorted(group, key=lambda place: dot_natural_key(place.tensor)):
        columns[place.pattern].append(place)
    counts = {len(places) for places in columns.values()}
    if counts != {weight.shape[0]}:
        return "the files do not hold all experts of a layer"
    parts = tuple(
        tuple(_part(weight, place, shapes) for place in experts)
        for experts in zip(*columns.values(), strict=True)
    )
    fits = all(
        sum(part.rows for part in expert) == weight.rows
        and all(shapes[part.tensor] == (part.rows, weight.cols) for part in expert)
        for expert in parts
    )
    return InFiles(weight, parts=parts) if fits else "their shapes are not those of the class"


def _part(weight: StackedWeight, place: Place, shapes: Mapping[str, Shape]) -> ExpertPart:
    child = place.renamed.removeprefix(f"{weight.module}.").removesuffix(".weight")
    return ExpertPart(place.tensor, child, shapes[place.tensor][0])


def _separate(converter: WeightConverter) -> bool:
    """Whether `converter` stacks a tensor of each expert, or several, one below another."""
    kinds = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    stacks = kinds[:1] == [(MergeModulelist, 0)]
    several = len(converter.source_patterns) > 1
    return stacks and kinds[1:] == ([(Concatenate, 1)] if several else [])


def _whole(
    weight: StackedWeight, tensor: str, converter: WeightConverter | None, shape: Shape
) -> InFiles | str:
    """One tensor for all experts, as the class has it or transposed."""
    flipped = False
    if converter is not None:
        kinds = [
            (type(op), {op.dim0, op.dim1})
            for op in converter.operations
            if isinstance(op, Transpose)
        ]
        if len(converter.operations) != 1 or kinds != [(Transpose, {1, 2})]:
            return "transformers rearranges them while loading"
        checks = getattr(converter.operations[0], "check_dims", False)
        flipped = not (checks and shape == weight.shape)
    wanted = (weight.shape[0], weight.shape[2], weight.shape[1]) if flipped else weight.shape
    if shape != wanted:
        return "their shapes are not those of the class"
    return InFiles(weight, whole=tensor, transposed=weight.transposed != flipped)
