"""A linear layer with an IEC-LoRA adapter, on a quantized or a dense base.

    x' = A drop(x) + beta1 P x        y = W x + s (B x' + beta2 E x')

Where dropout is off, `A + beta1 P` and `B + beta2 E` are folded into the two small matrices first,
so that the connections cost nothing for each token (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from irq_convert.core.elastic import (
    block_sums,
    block_weights,
    elastic,
    fold_elastic,
    repeat_blocks,
)
from irq_convert.core.scales import expand_statistic
from irq_convert.errors import IrqError, UsageError
from irq_convert.nn.linear import IrqLinear, dense_layer
from irq_convert.nn.lowrank import add_low_rank

if TYPE_CHECKING:
    from irq_convert.adapters.config import IecLoraConfig


class Betas(nn.Module):
    """The two betas of an adapter, `weight` `[2]`.

    A module, so that the parameter's name holds ".<adapter>." in its middle, as A's and B's do:
    libraries tell adapters apart by that, and copy one to another by its name.
    """

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=like.dtype, device=like.device))


class IecVariant(LoraVariant):
    """What one adapter of a layer computes: its connections and its pooling."""

    def __init__(self, config: IecLoraConfig, block_size: int | None) -> None:
        self.input = config.connection in ("both", "input")
        self.output = config.connection in ("both", "output")
        self.block_size = block_size

    def init(self, module: IecLoraLinear, adapter_name: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Add the betas, 0 at the start, and for a pooled adapter give A its columns."""
        weight = _weight(module.lora_A, adapter_name)
        if self.block_size is not None:
            blocks = -(-module.in_features // self.block_size)
            module.lora_A[adapter_name] = _pooled_a(weight, blocks)
        if self.input or self.output:
            module.lora_iec_beta[adapter_name] = Betas(weight)

    def folded(self, module: IecLoraLinear, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`A' = A + beta1 P` and `B' = B + beta2 E`, differentiable, in the dtype of A and B."""
        return self._folded_a(module, adapter), self._folded_b(module, adapter)

    def _folded_a(self, module: IecLoraLinear, adapter: str) -> torch.Tensor:
        weight = _weight(module.lora_A, adapter)
        if not self.input:
            return weight
        columns = None
        if self.block_size is not None:
            columns = block_weights(module.in_features, self.block_size, weight.device)
        return fold_elastic(weight, _weight(module.lora_iec_beta, adapter)[0], columns)

    def _folded_b(self, module: IecLoraLinear, adapter: str) -> torch.Tensor:
        weight = _weight(module.lora_B, adapter)
        if not self.output:
            return weight
        return fold_elastic(weight, _weight(module.lora_iec_beta, adapter)[1])

    def forward(  # type: ignore[override]
        self,
        module: IecLoraLinear,
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
        inner = functional.linear(dropout(x), _weight(module.lora_A, active_adapter))
        beta = _weight(module.lora_iec_beta, active_adapter)[0]
        inner = (inner + beta * self._pool(module, x, inner)) * scale
        return result + functional.linear(inner, b)

    def _pool(self, module: IecLoraLinear, x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """`P x` of the input, or of the block sums made means."""
        if self.block_size is not None:
            x = x * block_weights(module.in_features, self.block_size, x.device).to(x.dtype)
        return elastic(x, inner.shape[-1]).to(inner.dtype)

    def delta(self, module: IecLoraLinear, adapter: str) -> torch.Tensor:
        """The change of the weight, float32 or finer, `[out_features, in_features]`."""
        product = self.block_delta(module, adapter)
        if self.block_size is None:
            return product
        return repeat_blocks(product, module.in_features, self.block_size)

    def block_delta(self, module: IecLoraLinear, adapter: str) -> torch.Tensor:
        """`s B' A'`: for a pooled adapter what each block's tau moves by."""
        with torch.no_grad():
            a, b = (
                w if w.dtype == torch.float64 else w.float() for w in self.folded(module, adapter)
            )
            return (b @ a) * module.scaling[adapter]

    def merge_safe(  # type: ignore[override]
        self, module: IecLoraLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """A dense weight plus the change; of a Conv1D transposed."""
        delta = self.delta(module, active_adapter)
        return (orig_weight + (delta.T if module.fan_in_fan_out else delta)).to(orig_weight.dtype)

    def merge_unsafe(  # type: ignore[override]
        self, module: IecLoraLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> None:
        """`merge_safe` in place."""
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight.data)

    def unmerge(  # type: ignore[override]
        self, module: IecLoraLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """A merged dense weight minus the change."""
        delta = self.delta(module, active_adapter)
        return (orig_weight - (delta.T if module.fan_in_fan_out else delta)).to(orig_weight.dtype)


def _weight(matrices: nn.ModuleDict, adapter: str) -> torch.Tensor:
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


class IecLoraLinear(LoraLinear):
    """PEFT's LoRA layer whose adapters are `IecVariant`s; on `IrqLinear`, `nn.Linear`, `Conv1D`."""

    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self._packed: list[IrqLinear] = []  # a list, so that it is no submodule
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; the betas get their place beside A and B."""
        if "lora_iec_beta" not in self.adapter_layer_names:
            self.adapter_layer_names = (*self.adapter_layer_names, "lora_iec_beta")
            self.lora_iec_beta = nn.ModuleDict({})
        super().update_layer(adapter_name, *args, **kwargs)

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> IecVariant:
        """The variant of `config`; `UsageError` when it asks for another of PEFT's as well."""
        try:
            other = super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            raise UsageError(f"IEC-LoRA: {error}") from error
        if other is not None:
            raise UsageError(
                f"IEC-LoRA cannot be combined with {type(other).__name__}: use one or the other"
            )
        return IecVariant(config, self._block_size(config))

    def _block_size(self, config: IecLoraConfig) -> int | None:
        if config.pool is None:
            return None
        base = self.get_base_layer()
        own = base.fmt.block_size if isinstance(base, IrqLinear) else config.block_size
        if own is None:
            raise UsageError(
                f"pool='block' on a dense layer [{self.out_features}, {self.in_features}] needs "
                "block_size, or leave dense layers out of target_modules"
            )
        if config.block_size not in (None, own):
            raise UsageError(
                f"block_size {config.block_size} of the adapter, but the layer "
                f"[{self.out_features}, {self.in_features}] has blocks of {own}: leave it out"
            )
        return own

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The change that `adapter` makes, in the layout of the base weight, in the dtype of B."""
        dtype = _weight(self.lora_B, adapter).dtype
        delta = self._variant(adapter).delta(self, adapter).to(dtype)
        return delta.T if self.fan_in_fan_out else delta

    def _variant(self, adapter: str) -> IecVariant:
        variant = self.lora_variant[adapter]
        assert isinstance(variant, IecVariant)
        return variant

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base. A packed base is put aside, whole, for `unmerge`.

        Pooled adapters alone leave the layer packed, with its tau in float32; any other makes it
        dense. Raises `IrqError` when the result is not finite.
        """
        base = self.get_base_layer()
        if not isinstance(base, IrqLinear):
            super().merge(safe_merge, adapter_names)
            return
        names = [n for n in check_adapters_to_merge(self, adapter_names) or () if n in self.lora_A]
        if not names:
            return
        pooled = all(self._variant(name).block_size is not None for name in names)
        merged = self._move_tau(base, names) if pooled else self._densify(base, names)
        self._packed = self._packed or [base]
        self.base_layer = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take merged adapters out again: a packed base comes back bit for bit."""
        if not self._packed:
            super().unmerge()
            return
        self.base_layer = self._packed.pop()
        self.merged_adapters.clear()

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> IecLoraLinear:
        """Move what is put aside along, so that `unmerge` finds it where the layer is."""
        for base in self._packed:
            base._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def _move_tau(self, base: IrqLinear, names: list[str]) -> IrqLinear:
        q = base.quantized()
        tau = expand_statistic(q.tau, q.tau_grid).double()
        for name in names:
            tau += self._variant(name).block_delta(self, name).double()
        _require_finite(tau, names)
        moved = replace(q, tau=tau.float(), tau_grid=None)
        layer = IrqLinear.from_quantized(moved)
        layer.fmt = replace(layer.fmt, transposed=base.fmt.transposed)
        layer.bias = base.bias  # itself: a new parameter would require gradients
        layer.dense_dtype = base.dense_dtype
        return layer.train(base.training)

    def _densify(self, base: IrqLinear, names: list[str]) -> nn.Module:
        weight = base.dequantize(torch.float32)
        for name in names:
            weight += self._variant(name).delta(self, name).to(weight.dtype)
        _require_finite(weight, names)
        return dense_layer(base, nn.Parameter(weight.to(base.dense_dtype), requires_grad=False))

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.", "iec_lora.", 1)


def _require_finite(values: torch.Tensor, names: list[str]) -> None:
    if not bool(values.isfinite().all()):
        raise IrqError(
            f"merging {', '.join(names)} gives NaN or infinite weights: the adapter is broken"
        )
