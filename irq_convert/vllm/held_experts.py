"""Packed experts of one layer of a mixture: each is multiplied with the tokens that chose it.

`irq::served_experts` keeps compilers from looking inside: how many tokens choose an expert is not
known ahead. It finds the layer by its name, as vLLM's own operators of attention and mixtures do.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
from torch import nn

from irq_convert.errors import IrqError
from irq_convert.vllm.held import HeldWeights

Activation = Callable[[torch.Tensor], torch.Tensor]
"""What the first product gives, `[tokens, ..]`, to the input of the second."""


class HeldExperts(nn.Module):
    """The experts that a rank holds: `first` (gate and up, or up alone) and `second` of each.

    `name` is the layer's in the model. Raises `IrqError` for a second layer of that name.
    """

    def __init__(
        self,
        name: str,
        first: list[HeldWeights],
        second: list[HeldWeights],
        activation: Activation,
    ) -> None:
        super().__init__()
        if name in _LAYERS:
            raise IrqError(f"{name}: two mixtures of this name are served in one process")
        self.name = name
        self.first = nn.ModuleList(first)
        self.second = nn.ModuleList(second)
        self.activation = activation
        _LAYERS[name] = self

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the experts that each token chose.

        `x` floating `[tokens, cols]`; `weights` floating and `ids` integers `[tokens, choices]`, a
        negative id being an expert that another rank holds. Returns `[tokens, rows]` in the dtype
        of `x`; sums are taken in float32.
        """
        found: torch.Tensor = torch.ops.irq.served_experts(x, weights, ids, self.name)
        return found

    def mix(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """`forward`, outside an operator."""
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for number in ids.unique().tolist():
            if number < 0:
                continue
            tokens, choices = torch.nonzero(ids == number, as_tuple=True)
            hidden = self.activation(self.first[number](x[tokens]))
            part = self.second[number](hidden).float()
            y.index_add_(0, tokens, part * weights[tokens, choices, None].float())
        return y.to(x.dtype)

    def finish(self, empty: bool = False) -> None:
        """As `HeldWeights.finish`, of all experts."""
        for held in (*self.first, *self.second):
            held.finish(empty)


_LAYERS: WeakValueDictionary[str, HeldExperts] = WeakValueDictionary()


def served_experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: str
) -> torch.Tensor:
    """`HeldExperts.mix` of the layer called `layer`."""
    return _LAYERS[layer].mix(x, weights, ids)


torch.library.define(
    "irq::served_experts", "(Tensor x, Tensor weights, Tensor ids, str layer) -> Tensor"
)
torch.library.impl("irq::served_experts", ("cpu", "cuda"))(served_experts)


@torch.library.register_fake("irq::served_experts")
def _fake(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: str) -> torch.Tensor:
    return torch.empty_like(x)
