"""Embeddings and heads in a choice: which tensors they are, and what a change of them costs.

A head is a linear weight like any other, behind the last layer. An input embedding gives row v of
its tensor to each token v, so that a change dW of it is expected to cost

    KL = 1/2 sum_v f_v sum_p g_p dW_vp^2,

f_v being the share of v among the tokens, and g_p the mean square of the gradient at number p of
the row. A tensor that is both costs the sum of the two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from irq_convert.hf.layered import LayeredModel
from irq_convert.hf.tables import ends
from irq_convert.jobs.calibration.sites import Site, linear_site
from irq_convert.jobs.calibration.states import StateFile, chunks
from irq_convert.jobs.calibration.text import Windows


@dataclass(frozen=True)
class Tables:
    """The embedding, as its module and the tensor of the files, and the head that are chosen for.

    Both are of one tensor where the model ties them; None for what stays as it is.
    """

    embedding: tuple[str, str] | None
    head: Site | None

    @classmethod
    def of(cls, model: LayeredModel, tensors: Collection[str]) -> Tables:
        """Those of `tensors` that are the weight of an embedding or a head of `model`."""
        looked, asked = (_tensor_of(model, name) for name in ends(model.model))
        embedding = looked if looked is not None and looked[1] in tensors else None
        head = None
        if asked is not None and asked[1] in tensors:
            head = linear_site(asked[0], model.module(asked[0]), asked[1])
        return cls(embedding, head)

    @property
    def tensors(self) -> set[str]:
        """Their names in the files."""
        found = {self.embedding[1]} if self.embedding else set()
        return found | {stored.tensor for stored in (self.head.stored if self.head else ())}


def _tensor_of(model: LayeredModel, name: str | None) -> tuple[str, str] | None:
    """Module `name` and the tensor that is its weight: its own, or one that it is tied to."""
    if name is None:
        return None
    weight = model.module(name).get_parameter("weight")
    tied = model.model.named_parameters(remove_duplicate=False)
    keys = [f"{name}.weight", *(key for key, parameter in tied if parameter is weight)]
    found = next((model.source.plain[key] for key in keys if key in model.source.plain), None)
    return None if found is None else (name, found)


def embedding_squares(
    model: LayeredModel, name: str, windows: Windows, gradients: StateFile
) -> tuple[np.ndarray, np.ndarray]:
    """f `[tokens]` and g `[width]` of the embedding in module `name`, over what is not held out.

    `gradients` are those at the hidden states before the first layer. Called inside
    `model.outside()`.
    """
    module: Any = model.module(name)
    count, tokens = windows.calibrating, int(windows.ids.shape[1])
    found = torch.zeros(module.weight.shape[1], dtype=torch.float64)
    for start, stop in chunks(0, count, tokens):
        ids = windows.ids[start:stop]
        with torch.enable_grad(), _looked_up(module) as rows:
            states = model.begin(ids)
        above = gradients.read(start, stop).to(model.device)
        (slope,) = torch.autograd.grad(states, rows[0], above)
        found += slope.square().sum((0, 1)).double().cpu() * _scale(module, ids, rows[0]) ** 2
    shares = torch.bincount(windows.ids[:count].flatten(), minlength=len(module.weight))
    return shares.numpy() / (count * tokens), found.numpy() / (count * tokens)


@contextmanager
def _looked_up(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What an embedding returns while the block runs, as leaves that gradients come to."""
    rows: list[torch.Tensor] = []

    def heard(_: nn.Module, args: tuple[Any, ...], found: torch.Tensor) -> torch.Tensor:
        rows.append(found.detach().requires_grad_())
        return rows[-1]

    handle = module.register_forward_hook(heard)
    try:
        yield rows
    finally:
        handle.remove()


def _scale(module: Any, ids: torch.Tensor, rows: torch.Tensor) -> float:
    """What a class multiplies the rows of its table by."""
    stored = module.weight[ids.to(module.weight.device)]
    return float(rows.detach().norm() / stored.norm().clamp_min(1e-30))
