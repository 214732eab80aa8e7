"""Weights that are quantized, of a decoder layer or the head: where they are in model and files.

A site is a parameter of the layer: a linear's weight, or the experts' stacked one. What the files
hold of it is one tensor, or several: rows of each of its matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from irq_convert.hf.layered import LayeredModel
from irq_convert.nn.recording import Listener, expert_inputs, linear_inputs


@dataclass(frozen=True)
class Rows:
    """Rows `start .. stop` of matrix number `matrix` of a site."""

    matrix: int
    start: int
    stop: int


@dataclass(frozen=True)
class StoredRows:
    """A tensor of the files, by name, and the rows of a site that lie in it, in order."""

    tensor: str
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class Site:
    """A parameter `module.parameter` of the model that holds `matrices` matrices of `cols` inputs.

    `stacked`: it belongs to experts; `transposed`: the class has inputs before outputs.
    """

    module: str
    parameter: str
    matrices: int
    cols: int
    stacked: bool
    transposed: bool
    stored: tuple[StoredRows, ...]

    @property
    def key(self) -> str:
        """Its name in the model."""
        return f"{self.module}.{self.parameter}"

    def matrix(self, model: LayeredModel, number: int) -> torch.Tensor:
        """Matrix `number`, `[outputs, inputs]`: a view of the loaded parameter."""
        weight = model.module(self.module).get_parameter(self.parameter)
        found = weight.data[number] if self.stacked else weight.data
        return found.T if self.transposed else found

    def read(self, model: LayeredModel, stored: StoredRows) -> torch.Tensor:
        """The weights of a tensor of the files, `[rows, cols]`, as the layer holds them now."""
        parts = [self.matrix(model, r.matrix)[r.start : r.stop] for r in stored.rows]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()

    def write(self, model: LayeredModel, stored: StoredRows, values: torch.Tensor) -> None:
        """Put `values`, as `read` returns them, into the layer."""
        at = 0
        for rows in stored.rows:
            count = rows.stop - rows.start
            self.matrix(model, rows.matrix)[rows.start : rows.stop] = values[at : at + count]
            at += count


def find_sites(model: LayeredModel, number: int, tensors: Collection[str]) -> tuple[Site, ...]:
    """The sites of layer `number` that hold some of `tensors`, in the order of the module."""
    return sites_below(model, model.layers[number], tensors)


def sites_below(model: LayeredModel, top: str, tensors: Collection[str]) -> tuple[Site, ...]:
    """The sites of the module called `top`, "" for the whole model, as `find_sites`."""
    prefix = f"{top}." if top else ""
    found: list[Site] = []
    for name, module in model.module(top).named_modules(prefix=top):
        if isinstance(module, nn.Linear | Conv1D):
            tensor = model.source.plain.get(f"{name}.weight")
            if tensor in tensors and tensor is not None:
                found.append(linear_site(name, module, tensor))
    for stack in model.source.stacks.values():
        weight = stack.weight
        if not weight.module.startswith(prefix) or not set(stack.tensors) & set(tensors):
            continue
        stored: list[StoredRows] = []
        if stack.whole is not None:
            every = tuple(Rows(expert, 0, weight.rows) for expert in range(weight.shape[0]))
            stored.append(StoredRows(stack.whole, every))
        for expert, parts in enumerate(stack.parts):
            at = 0
            for part in parts:
                stored.append(StoredRows(part.tensor, (Rows(expert, at, at + part.rows),)))
                at += part.rows
        kept = tuple(each for each in stored if each.tensor in tensors)
        found.append(
            Site(
                weight.module,
                weight.parameter,
                weight.shape[0],
                weight.cols,
                True,
                weight.transposed,
                kept,
            )
        )
    return tuple(found)


def linear_site(name: str, module: nn.Module, tensor: str) -> Site:
    """The site of a linear `module` called `name`, whose weight is all of `tensor`."""
    weight = module.get_parameter("weight")
    transposed = isinstance(module, Conv1D)
    rows, cols = weight.shape[::-1] if transposed else weight.shape
    stored = (StoredRows(tensor, (Rows(0, 0, rows),)),)
    return Site(name, "weight", 1, cols, False, transposed, stored)


@contextmanager
def listening(
    model: LayeredModel,
    sites: tuple[Site, ...],
    listener: Listener,
    outputs: Listener | None = None,
) -> Iterator[None]:
    """Tell `listener` what each of `sites`, by key, is given while its layer runs.

    `outputs` is told what it returns.
    """
    stacks: dict[str, dict[str, tuple[str, bool]]] = {}
    with ExitStack() as hooks:
        for site in sites:
            if site.stacked:
                own = stacks.setdefault(site.module, {})
                own[site.parameter] = (site.key, site.transposed)
            else:
                module = model.module(site.module)
                hooks.enter_context(linear_inputs(module, site.key, listener, outputs))
        for name, named in stacks.items():
            experts = model.module(name)
            hooks.enter_context(expert_inputs(experts, named, listener, outputs))
        yield


class SharedInputs:
    """Sorts weights into `groups` that are given the same tensor; `inputs` by the first of each.

    Those in `stacked`, the experts', are a group each and their inputs are not kept.
    """

    def __init__(self, groups: list[list[str]], stacked: set[str]) -> None:
        self._groups, self._stacked = groups, stacked
        self._known = {key for group in groups for key in group}
        self._last: torch.Tensor | None = None
        self.inputs: dict[str, torch.Tensor] = {}

    def listen(self, key: str, expert: int, x: torch.Tensor) -> None:
        if key not in self._known:
            self._known.add(key)
            if self._last is x and key not in self._stacked:
                self._groups[-1].append(key)
            else:
                self._groups.append([key])
            self._last = x
        if key not in self._stacked and any(group[0] == key for group in self._groups):
            self.inputs.setdefault(key, x)
