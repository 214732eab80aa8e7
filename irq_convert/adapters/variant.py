"""What one adapter adds to a linear layer: low-rank matrices with the connections of IEC.

    x' = A drop(x) + beta1 P x        y = W x + s (B x' + beta2 E x')

Where dropout is off, `A + beta1 P` and `B + beta2 E` are folded into the two small matrices first,
so that the connections cost nothing for each token (docs/method.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from torch.nn import functional

from irq_convert.adapters.statistics import Moves
from irq_convert.artifact.adapter_statistics import SCALE, TAU
from irq_convert.core.elastic import (
    block_sums,
    block_weights,
    elastic,
    fold_elastic,
    repeat_blocks,
)
from irq_convert.errors import UsageError
from irq_convert.nn.linear import IrqLinear
from irq_convert.nn.lowrank import add_low_rank

if TYPE_CHECKING:
    from irq_convert.adapters.config import IecLoraConfig


class AdaptedLinear(Protocol):
    """What a variant uses of the layer that it belongs to."""

    in_features: int
    out_features: int
    fan_in_fan_out: bool
    scaling: dict[str, float]
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    lora_iec_beta: nn.ModuleDict

    def parts(self, name: str) -> nn.ModuleDict:
        """Modules of our own by adapter."""

    def get_base_layer(self) -> nn.Module:
        """The layer without adapters."""


class Betas(nn.Module):
    """The two betas of an adapter, `weight` `[2]`.

    A module, so that the parameter's name holds ".<adapter>." in its middle, as A's and B's do:
    libraries tell adapters apart by that, and copy one to another by its name.
    """

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=like.dtype, device=like.device))


class IecVariant(LoraVariant):
    """What one adapter of a layer computes: its connections, its pooling, what of them there is.

    `low_rank` is False for an adapter of rank 0, which trains statistics alone.
    """

    def __init__(self, config: IecLoraConfig, block_size: int | None) -> None:
        self.input = config.connection in ("both", "input")
        self.output = config.connection in ("both", "output")
        self.block_size = block_size
        self.low_rank = config.r > 0
        self.scale = config.statistics in ("both", "scale")
        self.tau = config.statistics in ("both", "tau")

    def init(self, module: AdaptedLinear, adapter_name: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Add betas and moves of statistics, 0 at the start; give a pooled A its columns."""
        weight = weight_of(module.lora_A, adapter_name)
        base = module.get_base_layer()
        if isinstance(base, IrqLinear):
            for asked, name in ((self.scale, SCALE), (self.tau, TAU)):
                if asked:
                    like = base.weight_scale.to(weight.device)
                    module.parts(name)[adapter_name] = Moves(like)
        if not self.low_rank:
            if not isinstance(base, IrqLinear):
                raise UsageError(
                    f"statistics of a dense layer [{module.out_features}, {module.in_features}] "
                    "cannot be trained: leave it out of target_modules"
                )
            for part in (module.lora_A, module.lora_B, module.lora_dropout):
                del part[adapter_name]
            return
        if self.block_size is not None:
            blocks = -(-module.in_features // self.block_size)
            module.lora_A[adapter_name] = _pooled_a(weight, blocks)
        if self.input or self.output:
            module.lora_iec_beta[adapter_name] = Betas(weight)

    def folded(self, module: AdaptedLinear, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`A' = A + beta1 P` and `B' = B + beta2 E`, differentiable, in the dtype of A and B."""
        return self._folded_a(module, adapter), self._folded_b(module, adapter)

    def _folded_a(self, module: AdaptedLinear, adapter: str) -> torch.Tensor:
        weight = weight_of(module.lora_A, adapter)
        if not self.input:
            return weight
        columns = None
        if self.block_size is not None:
            columns = block_weights(module.in_features, self.block_size, weight.device)
        return fold_elastic(weight, weight_of(module.lora_iec_beta, adapter)[0], columns)

    def _folded_b(self, module: AdaptedLinear, adapter: str) -> torch.Tensor:
        weight = weight_of(module.lora_B, adapter)
        if not self.output:
            return weight
        return fold_elastic(weight, weight_of(module.lora_iec_beta, adapter)[1])

    def forward(  # type: ignore[override]
        self,
        module: AdaptedLinear,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`result` plus what the adapter makes of `x` `[..., in_features]`."""
        if self.block_size is not None:
            x = block_sums(x, self.block_size)
        dropout = module.lora_dropout[active_adapter]
        b, scale = self._folded_b(module, active_adapter), module.scaling[active_adapter]
        dropped = dropout.training and getattr(dropout, "p", 0) > 0
        if not (dropped and self.input):
            return add_low_rank(
                result, dropout(x), self._folded_a(module, active_adapter), b, scale
            )
        # The connection sees what dropout hides, so A and P have different inputs.
        inner = functional.linear(dropout(x), weight_of(module.lora_A, active_adapter))
        beta = weight_of(module.lora_iec_beta, active_adapter)[0]
        inner = (inner + beta * self._pool(module, x, inner)) * scale
        return result + functional.linear(inner, b)

    def _pool(self, module: AdaptedLinear, x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """`P x` of the input, or of the block sums made means."""
        if self.block_size is not None:
            x = x * block_weights(module.in_features, self.block_size, x.device).to(x.dtype)
        return elastic(x, inner.shape[-1]).to(inner.dtype)

    def delta(self, module: AdaptedLinear, adapter: str) -> torch.Tensor:
        """The change of the weight, float32 or finer, `[out_features, in_features]`."""
        product = self.block_delta(module, adapter)
        if self.block_size is None:
            return product
        return repeat_blocks(product, module.in_features, self.block_size)

    def block_delta(self, module: AdaptedLinear, adapter: str) -> torch.Tensor:
        """`s B' A'`: for a pooled adapter what each block's tau moves by."""
        with torch.no_grad():
            a, b = (
                w if w.dtype == torch.float64 else w.float() for w in self.folded(module, adapter)
            )
            return (b @ a) * module.scaling[adapter]

    def merge_safe(  # type: ignore[override]
        self, module: AdaptedLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """A dense weight plus the change; of a Conv1D transposed."""
        delta = self.delta(module, active_adapter)
        return (orig_weight + (delta.T if module.fan_in_fan_out else delta)).to(orig_weight.dtype)

    def merge_unsafe(  # type: ignore[override]
        self, module: AdaptedLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> None:
        """`merge_safe` in place."""
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(  # type: ignore[override]
        self, module: AdaptedLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """A merged dense weight minus the change."""
        delta = self.delta(module, active_adapter)
        return (orig_weight - (delta.T if module.fan_in_fan_out else delta)).to(orig_weight.dtype)


def weight_of(matrices: nn.ModuleDict, adapter: str) -> torch.Tensor:
    weight = matrices[adapter].weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _pooled_a(weight: torch.Tensor, blocks: int) -> nn.Linear:
    """A on `blocks` block sums, drawn so that `A u` spreads as LoRA's `A x` does.

    A sum over a block spreads as the root of its length, so the bound is LoRA's for all the
    inputs, not for the blocks alone: any columns of LoRA's own `weight` will do.
    """
    new = nn.Linear(blocks, weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        new.weight.copy_(weight[:, :blocks])
    return new
