"""Which layers of a model become packed ones, and putting them in place, all on meta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from irq_convert.artifact.config import PART_SUFFIXES, ModuleFormat
from irq_convert.core.parts import SUFFIXES
from irq_convert.hf.tied import tie_parts
from irq_convert.nn.embedding import IrqEmbedding
from irq_convert.nn.experts import Separate, Stacked, pack_experts
from irq_convert.nn.linear import IrqLinear
from irq_convert.nn.packed import PackedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Swap:
    """A layer to be quantized: its name in the model, its tensor in the files, its format.

    `tied` are other modules that hold the same parameters.
    """

    module: str
    tensor: str
    fmt: ModuleFormat
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Child:
    """A layer of one expert, `[rows, cols]`, by its tensor in the files; dense without `fmt`."""

    tensor: str
    rows: int
    cols: int
    fmt: ModuleFormat | None


@dataclass(frozen=True)
class ExpertsSwap:
    """A module of experts to be packed.

    `layouts` by parameter; `stacks` has the tensor of those that the files hold whole, `children`
    the layers of the others by their names in the module.
    """

    module: str
    layouts: dict[str, Stacked | Separate] = field(default_factory=dict)
    stacks: dict[str, str] = field(default_factory=dict)
    children: dict[str, Child] = field(default_factory=dict)


@dataclass(frozen=True)
class Swaps:
    """Everything in a model that is replaced."""

    linears: tuple[Swap, ...]
    experts: tuple[ExpertsSwap, ...]

    def packed(self) -> Iterator[tuple[str, str]]:
        """Quantized tensors of the files with their names in the model."""
        for swap in self.linears:
            yield swap.tensor, f"{swap.module}.weight"
        for experts in self.experts:
            for name, tensor in experts.stacks.items():
                yield tensor, f"{experts.module}.{name}"
            for name, child in experts.children.items():
                if child.fmt is not None:
                    yield child.tensor, f"{experts.module}.{name}.weight"

    def dense(self) -> Iterator[tuple[str, str]]:
        """Dense tensors of the files that get a layer of their own, with their names there."""
        for experts in self.experts:
            for name, child in experts.children.items():
                if child.fmt is None:
                    yield child.tensor, f"{experts.module}.{name}.weight"

    def keys(self, tensors: Mapping[str, object]) -> dict[str, str]:
        """Name in the model by name in the files, of all parts that are in `tensors`."""
        found = {
            tensor + suffix: key + suffix
            for tensor, key in self.packed()
            for suffix in SUFFIXES
            if tensor + suffix in tensors
        }
        return found | dict(self.dense())

    def pairs(self, tensors: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
        """Packed parameters of the model, each with every part of it that is in `tensors`."""
        return tuple(
            (key, key + suffix)
            for tensor, key in self.packed()
            for suffix in PART_SUFFIXES
            if tensor + suffix in tensors
        )

    def spared(self, tensors: Mapping[str, object]) -> frozenset[str]:
        """Names in the model that transformers must not merge or rearrange while loading."""
        return frozenset(self.keys(tensors).values()) if self.experts else frozenset()


def swap_layers(model: PreTrainedModel, swaps: Swaps) -> None:
    """Replace the layers of `swaps` in `model`; the packed ones have no data yet."""
    for swap in swaps.linears:
        for name in (swap.module, *swap.tied):
            dense = model.get_submodule(name)
            packed = _packed(dense, swap.fmt)
            packed.label = swap.tensor
            model.set_submodule(name, packed.train(dense.training))
        if swap.tied:
            tie_parts(model, {swap.module, *swap.tied}, packed.packed_parts())
    for experts in swaps.experts:
        module = model.get_submodule(experts.module)
        dtype = module.get_parameter(next(iter(experts.layouts))).dtype
        children: dict[str, nn.Module] = {}
        for name, child in experts.children.items():
            size = (child.cols, child.rows)
            if child.fmt is None:
                layer: nn.Module = nn.Linear(*size, bias=False, device="meta", dtype=dtype)
            else:
                layer = IrqLinear(*size, child.fmt, bias=False, device="meta", dtype=dtype)
                layer.label = child.tensor
            children[name] = layer.train(module.training)
        pack_experts(module, experts.layouts, children, experts.stacks)


def _packed(dense: nn.Module, fmt: ModuleFormat) -> PackedWeight:
    """What takes the place of `dense`; a class of embeddings that does more goes into it."""
    rows, cols = layer_shape(dense)
    dtype = dense.get_parameter("weight").dtype
    if not isinstance(dense, nn.Embedding):
        bias = dense.bias is not None
        return IrqLinear(cols, rows, fmt, bias, device="meta", dtype=dtype)
    table = IrqEmbedding(rows, cols, fmt, dense.padding_idx, device="meta", dtype=dtype)
    if type(dense) is not nn.Embedding:
        table.wrap(dense)
    return table


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of an `nn.Linear` or a `Conv1D`, rows and their length of a table."""
    weight = layer.get_parameter("weight")
    rows, cols = weight.shape
    return (cols, rows) if isinstance(layer, Conv1D) else (rows, cols)
