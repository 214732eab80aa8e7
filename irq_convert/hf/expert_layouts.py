"""How files hold the experts of a mixture: each layout a function that knows its own.

A layout is given the stacked weight of the class, the tensors of the files that transformers would
make it of, and the shapes of all tensors. It returns how the files hold the weight, a line that
says why it cannot be packed, or None for tensors of another layout. A further layout is a function
in `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
)

from irq_convert.hf.names import Place

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


Layout = Callable[[StackedWeight, list[Place], Mapping[str, Shape]], "InFiles | str | None"]


def separate_tensors(
    weight: StackedWeight, group: list[Place], shapes: Mapping[str, Shape]
) -> InFiles | str | None:
    """A tensor for each expert, or several, which transformers stacks one below another."""
    converter = group[0].converter
    if converter is None or not _stacks(converter):
        return None
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


def _stacks(converter: WeightConverter) -> bool:
    """Whether `converter` stacks a tensor of each expert, or several, one below another."""
    kinds = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    stacks = kinds[:1] == [(MergeModulelist, 0)]
    several = len(converter.source_patterns) > 1
    return stacks and kinds[1:] == ([(Concatenate, 1)] if several else [])


def whole_tensor(
    weight: StackedWeight, group: list[Place], shapes: Mapping[str, Shape]
) -> InFiles | str | None:
    """One tensor for all experts, as the class has it or transposed."""
    if len(group) != 1:
        return None
    tensor, converter = group[0].tensor, group[0].converter
    shape = shapes[tensor]
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


LAYOUTS: tuple[Layout, ...] = (separate_tensors, whole_tensor)


def lay_out(
    weight: StackedWeight, group: list[Place], shapes: Mapping[str, Shape]
) -> InFiles | str:
    """How the tensors `group` make up `weight`, by the first layout that knows them, or why not."""
    for layout in LAYOUTS:
        found = layout(weight, group, shapes)
        if found is not None:
            return found
    return "several tensors stand for one weight"
