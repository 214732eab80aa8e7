"""Weights of some modules of a model on meta, read from the files for as long as they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from irq_convert.artifact.config import module_name
from irq_convert.checkpoint.fetcher import ReadOrder
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.errors import IrqError
from irq_convert.hf.expert_layouts import InFiles
from irq_convert.hf.experts import find_experts
from irq_convert.hf.names import places


@dataclass(frozen=True)
class WeightSource:
    """What the files hold for each key of a model's state dict.

    `plain`: a tensor under another name. `stacks`: the experts of a layer. `module_of`: the module
    of the model that each linear weight of the files belongs to.
    """

    checkpoint: Checkpoint
    plain: Mapping[str, str]
    stacks: Mapping[str, InFiles]
    module_of: Mapping[str, str]

    @classmethod
    def of(cls, model: Any, checkpoint: Checkpoint) -> WeightSource:
        """The source of `model`, on meta, whose files are those of `checkpoint`."""
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        stacks = find_experts(model, shapes).found
        plain = {p.key: p.tensor for p in places(model, shapes) if p.converter is None}
        module_of = {tensor: module_name(key) for key, tensor in plain.items()}
        for found in stacks.values():
            module_of |= dict.fromkeys(found.tensors, found.weight.module)
        return cls(checkpoint, plain, stacks, module_of)

    def tensor_of(self, model: Any, module: str) -> str | None:
        """The tensor that is the weight of `module`: its own, or one that it is tied to."""
        weight = model.get_submodule(module).get_parameter("weight")
        tied = model.named_parameters(remove_duplicate=False)
        keys = [f"{module}.weight", *(key for key, parameter in tied if parameter is weight)]
        return next((self.plain[key] for key in keys if key in self.plain), None)

    @contextmanager
    def loaded(
        self,
        model: Any,
        wanted: Callable[[str], bool],
        device: str,
        read_order: ReadOrder | None = None,
    ) -> Iterator[None]:
        """Give the parameters and buffers whose keys are `wanted` their values, in float32.

        Parameters that are one on meta stay one. Afterwards they are on meta again. `read_order`
        brings the files. Raises `IrqError` naming the key when they have nothing to read for it.
        """
        slots = _slots(model)
        aliases = _aliases(slots)
        chosen = [slot for slot in slots if wanted(slot[2])]
        before = [(holder, last, holder[last]) for holder, last, _ in chosen]
        made: dict[int, torch.Tensor] = {}
        try:
            with TileReader(read_order=read_order) as reader:
                for holder, last, _ in chosen:
                    meta = holder[last]
                    if id(meta) not in made:
                        value = self._read(reader, aliases[id(meta)], meta).to(device)
                        if isinstance(meta, nn.Parameter):
                            value = nn.Parameter(value, requires_grad=False)
                        made[id(meta)] = value
            for holder, last, meta in before:
                holder[last] = made[id(meta)]
            yield
        finally:
            for holder, last, meta in before:
                holder[last] = meta

    def held(self, model: Any, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        """The loaded parameters whose keys are `wanted`, by tensor of the files."""
        every = model.named_parameters(remove_duplicate=False)
        chosen = ((self.plain.get(key), value.data) for key, value in every if wanted(key))
        return {tensor: value for tensor, value in chosen if tensor is not None}

    @contextmanager
    def replaced(self, model: Any, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Let loaded parameters have other `values`, by tensor of the files, in the block."""
        before: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
        for key, parameter in model.named_parameters(remove_duplicate=False):
            value = values.get(self.plain.get(key, ""))
            if value is not None and id(parameter) not in before:
                before[id(parameter)] = parameter, parameter.data
                parameter.data = value.to(parameter.device)
        try:
            yield
        finally:
            for parameter, own in before.values():
                parameter.data = own

    def tensors(self, model: Any, wanted: Callable[[str], bool]) -> list[TensorInfo]:
        """What `loaded` reads, in its order."""
        slots = _slots(model)
        aliases, seen, found = _aliases(slots), set(), []
        for holder, last, key in slots:
            if wanted(key) and id(holder[last]) not in seen:
                seen.add(id(holder[last]))
                keys = aliases[id(holder[last])]
                plain = next((self.plain[key] for key in keys if key in self.plain), None)
                stack = next((self.stacks[key] for key in keys if key in self.stacks), None)
                names = stack.tensors if stack else () if plain is None else (plain,)
                found += [self._info(name) for name in names]
        return found

    def _read(self, reader: TileReader, keys: list[str], meta: torch.Tensor) -> torch.Tensor:
        """The value of a parameter that goes by `keys`, in float32 where it is a float."""
        found = next((key for key in keys if key in self.plain or key in self.stacks), None)
        if found is None:
            raise IrqError(f"{keys[0]} {list(meta.shape)}: transformers makes it of other tensors")
        if found in self.stacks:
            return self._stack(reader, self.stacks[found])
        value = reader.read_tensor(self._info(self.plain[found]))
        return value.float() if value.is_floating_point() else value

    def _stack(self, reader: TileReader, found: InFiles) -> torch.Tensor:
        weight = found.weight
        if found.whole is not None:
            whole = reader.read_tensor(self._info(found.whole)).float()
            same = found.transposed == weight.transposed
            return whole if same else whole.transpose(1, 2).contiguous()
        stack = torch.empty(weight.shape)
        for expert, parts in zip(stack, found.parts, strict=True):
            at = 0
            for part in parts:
                rows = reader.read_tensor(self._info(part.tensor))
                expert[at : at + len(rows)] = rows
                at += len(rows)
        return stack

    def _info(self, tensor: str) -> TensorInfo:
        return self.checkpoint.tensors[tensor]


Slot = tuple[dict[str, Any], str, str]
"""Where a module holds a tensor: the dictionary, its name there, and its name in the model."""


def _slots(model: Any) -> list[Slot]:
    """The tensors of `model` that are on meta."""
    return [
        (holder, last, f"{name}.{last}" if name else last)
        for name, module in model.named_modules()
        for holder in (module._parameters, module._buffers)
        for last, value in holder.items()
        if value is not None and value.is_meta
    ]


def _aliases(slots: list[Slot]) -> dict[int, list[str]]:
    """All names of each tensor, which tied ones have several of."""
    found: dict[int, list[str]] = {}
    for holder, last, key in slots:
        found.setdefault(id(holder[last]), []).append(key)
    return found
