"""Both ends of a model in a choice, its input embedding and its head: what a change of them costs.

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
class Ends:
    """The embedding, as its module and the tensor of the files, and the head that are chosen for.

    Both are of one tensor where the model ties them; None for what stays as it is.
    """

    embedding: tuple[str, str] | None
    head: Site | None

    @classmethod
    def of(cls, model: LayeredModel, tensors: Collection[str]) -> Ends:
        """Those of `tensors` that are the weight of an embedding or a head of `model`."""
        names = ends(model.model)
        looked, asked = (name and model.source.tensor_of(model.model, name) for name in names)
        embedding, head = None, None
        if names[0] and looked in tensors and looked is not None:
            embedding = names[0], looked
        if names[1] and asked in tensors and asked is not None:
            head = linear_site(names[1], model.module(names[1]), asked)
        return cls(embedding, head)

    @property
    def first(self) -> set[str]:
        """The embedding's tensor, if any."""
        return {self.embedding[1]} if self.embedding else set()

    @property
    def last(self) -> set[str]:
        """The head's tensor, if any."""
        return {stored.tensor for stored in self.head.stored} if self.head else set()


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
        found += slope.square().sum((0, 1)).cpu().double() * _scale(module, ids, rows[0]) ** 2
    shares = torch.bincount(windows.ids[:count].flatten(), minlength=len(module.weight))
    return shares.numpy() / (count * tokens), found.numpy() / (count * tokens)


@contextmanager
def _looked_up(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What an embedding returns while the block runs, as leaves that gradients come to."""
    rows: list[torch.Tensor] = []

    def heard(_: nn.Module, args: tuple[Any, ...], found: torch.Tensor) -> torch.Tensor:
        rows.append(found.detach().requires_grad_())
        return rows[-1].clone()  # a class may change it in place

    handle = module.register_forward_hook(heard)
    try:
        yield rows
    finally:
        handle.remove()


def _scale(module: Any, ids: torch.Tensor, rows: torch.Tensor) -> float:
    """What a class multiplies the rows of its table by."""
    stored = module.weight[ids.to(module.weight.device)]
    return float(rows.detach().norm() / stored.norm().clamp_min(1e-30))
