"""Experts of a mixture with packed weights, computed by the forward of their own class.

The class of a module is replaced by one that derives from it, and its stacked parameters by packed
ones, in the layout that the files have: either the stack, packed (`gate_up_proj`, `gate_up_proj_
scale`, ...), or one child module a tensor (`0.gate_proj`, `0.up_proj`, ...). The forward is the
class's own eager one, gating, biases and all; its weights are stand-ins that multiply the tokens of
one expert at a time (`stacks.py`), so nothing dense is kept for the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from irq_convert.artifact.config import ModuleFormat
from irq_convert.core.dequantize import dequantize_rows
from irq_convert.core.parts import SUFFIXES
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.errors import IrqError
from irq_convert.nn.function import packed_linear
from irq_convert.nn.guard import guarded_parameter, unguarded
from irq_convert.nn.linear import IrqLinear, autocast_input
from irq_convert.nn.packed import exact_columns, keep_dtypes, named_parts
from irq_convert.nn.parts import cut_rows, format_of, narrow_parts
from irq_convert.nn.stacks import ExpertStack, Linear


@dataclass(frozen=True)
class Stacked:
    """A packed parameter of `experts` matrices `[rows, cols]`, stored one below the other."""

    fmt: ModuleFormat
    experts: int
    rows: int
    cols: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """As the class takes it: `transposed` ones are `[experts, cols, rows]`."""
        pair = (self.cols, self.rows) if self.transposed else (self.rows, self.cols)
        return (self.experts, *pair)


@dataclass(frozen=True)
class Separate:
    """Child modules by expert, each a part of its rows, that stand for one parameter."""

    children: tuple[tuple[str, ...], ...]
    rows: int
    cols: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self.children), self.rows, self.cols)


class IrqExperts(nn.Module):
    """Mixed into a class of experts by `pack_experts`."""

    # transformers would fill the parameters of a module it takes for new with noise.
    _is_hf_initialized = True
    packed: dict[str, Stacked | Separate]
    labels: dict[str, str]
    dense_dtype: torch.dtype

    def __getattr__(self, name: str) -> Any:
        """A parameter or module; codes of a stack refuse to be a dense one."""
        found = super().__getattr__(name)
        layout = self.__dict__.get("packed", {}).get(name)
        if not isinstance(layout, Stacked):
            return found
        label = f"{self.labels.get(name, name)} {list(layout.shape)} in {layout.fmt.codebook}"
        return guarded_parameter(found, label)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, unguarded(value))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the class computes, in the input's dtype."""
        return eager_forward(_dense_class(type(self)))(_View(self), *args, **kwargs)

    def stack(self, name: str) -> ExpertStack:
        """What stands for parameter `name` in the forward."""
        layout = self.packed[name]
        like: torch.Tensor = next(self.parameters())
        if isinstance(layout, Stacked) and name not in self._parameters:
            raise IrqError(
                f"an adapter was put on {name}, a packed stack of experts, as PEFT does for "
                "target_parameters: that cannot be computed; target other layers"
            )
        pretend = torch.empty(0, dtype=self.dense_dtype, device=like.device)
        transposed = isinstance(layout, Stacked) and layout.transposed
        expert = functools.partial(self._expert, name, layout)
        return ExpertStack(expert, layout.shape, transposed, pretend)

    def _expert(self, name: str, layout: Stacked | Separate, number: int) -> list[Linear]:
        if isinstance(layout, Separate):
            return [self.get_submodule(child) for child in layout.children[number]]
        return [functools.partial(_multiply, self.quantized(name, number), self.training)]

    def _part(self, name: str, suffix: str) -> torch.Tensor:
        found = self._parameters[name + suffix]
        assert isinstance(found, torch.Tensor)
        return found

    def quantized(self, name: str, number: int) -> QuantizedTensor:
        """The weight of one expert of a stack, `[rows, cols]`.

        Shares the parameters' memory where the expert's blocks begin with a group of 256; else its
        statistics are decoded first.
        """
        layout = self.packed[name]
        assert isinstance(layout, Stacked)
        q = self._whole(name, layout)
        start, stop = number * layout.rows, (number + 1) * layout.rows
        return cut_rows(q, start, stop)

    def _whole(self, name: str, layout: Stacked) -> QuantizedTensor:
        grids = [getattr(self, f"{name}{suffix}", None) for suffix in ("_scale_grid", "_tau_grid")]
        rows = layout.experts * layout.rows
        codes, scale, tau = (
            self._part(name, suffix).view(rows, -1) for suffix in ("", "_scale", "_tau")
        )
        fmt = layout.fmt
        return QuantizedTensor(
            codes, scale, tau, grids[0], grids[1], layout.cols, fmt.codebook, fmt.block_size
        )

    def packed_parts(self) -> dict[str, nn.Parameter]:
        """The packed parameters of this module itself: codes, statistics and grids."""
        names = [
            name + suffix
            for name, layout in self.packed.items()
            if isinstance(layout, Stacked)
            for suffix in SUFFIXES
        ]
        found = {name: self._parameters.get(name) for name in names}
        return {name: part for name, part in found.items() if part is not None}

    def part_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype that each of `packed_parts` has by its format."""
        return {
            part: dtype
            for name, layout in self.packed.items()
            if isinstance(layout, Stacked)
            for part, (_, dtype) in stack_parts(name, layout).items()
        }

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> nn.Module:
        """Let `fn` move the packed parts but not change their dtypes."""
        super()._apply(keep_dtypes(self.packed_parts().values(), fn), recurse)
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            narrow_parts(destination, prefix, self.part_dtypes())

    def stored_format(self, name: str) -> ModuleFormat:
        """The format of what a state dict holds of a stack (`IrqLinear.stored_format`)."""
        layout = self.packed[name]
        assert isinstance(layout, Stacked)
        return format_of(layout.fmt, name, self.packed_parts(), self.part_dtypes())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (_dense_class(type(self)),), self.__dict__


class _View:
    """A module as its own forward sees it: stand-ins for the packed parameters."""

    def __init__(self, module: IrqExperts) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        module = self._module
        return module.stack(name) if name in module.packed else getattr(module, name)


def eager_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward that the source of `cls` shows, without transformers' choice of kernels."""
    found: Callable[..., Any] = cls.forward
    chooses = hasattr(cls, "_apply_gate")  # transformers gives this to classes that it wraps
    return getattr(found, "__wrapped__", found) if chooses else found


def pack_experts(
    module: nn.Module,
    layouts: Mapping[str, Stacked | Separate],
    children: Mapping[str, nn.Module],
    labels: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Turn `module` into packed experts, in place and on meta.

    Parameters named by `layouts` give way to packed parts of a stack, or to `children` by their
    names in the module (`"0.up_proj"`). `labels` are what a message calls them.
    """
    first = module.get_parameter(next(iter(layouts)))
    cls: Any = type(module)
    module.__class__ = _packed_class(cls)
    assert isinstance(module, IrqExperts)
    module.packed, module.labels = dict(layouts), dict(labels)
    module.dense_dtype = first.dtype
    for name, layout in layouts.items():
        del module._parameters[name]
        if isinstance(layout, Stacked):
            for part, (shape, dtype) in stack_parts(name, layout).items():
                empty = torch.zeros(shape, dtype=dtype, device=first.device)
                module.register_parameter(part, nn.Parameter(empty, requires_grad=False))
    for name, child in children.items():
        parent: nn.Module = module
        *path, last = name.split(".")
        for step in path:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(last, child)


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
    cls: Any = _dense_class(type(module))
    module.__class__ = cls
    for left in ("packed", "labels", "dense_dtype"):
        delattr(module, left)
    for name, weight in dense.items():
        module.register_parameter(name, nn.Parameter(weight))


def _multiply(q: QuantizedTensor, training: bool, x: torch.Tensor) -> torch.Tensor:
    return packed_linear(autocast_input(x), q, training=training)


def _dense_rows(module: nn.Module, child: str, dtype: torch.dtype) -> torch.Tensor:
    layer = module.get_submodule(child)
    if isinstance(layer, IrqLinear):
        return layer.dequantize(dtype)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().to(dtype)


def stack_parts(name: str, layout: Stacked) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the parameters that hold a stack."""
    fmt = exact_columns(layout.fmt, layout.cols)
    return named_parts(name, (layout.experts, layout.rows), layout.cols, fmt)


@functools.cache
def _packed_class(cls: Any) -> Any:
    return type(f"Irq{cls.__name__}", (IrqExperts, cls), {"__module__": cls.__module__})


def _dense_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that was packed; torch may have derived from ours (parametrizations)."""
    own = next(c for c in cls.__mro__ if c.__bases__[:1] == (IrqExperts,))
    return own.__bases__[1]


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    kind: Any = cls
    packed = _packed_class(kind)
    made: nn.Module = packed.__new__(packed)
    return made
