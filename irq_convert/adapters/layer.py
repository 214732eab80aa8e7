"""A linear layer with adapters of our own type, on a quantized or a dense base.

Adapters that move statistics change the base's weight before the product, all others add to its
result (`variant.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from irq_convert.adapters.statistics import MovesStatistics, require_finite, require_scales
from irq_convert.adapters.variant import IecVariant, weight_of
from irq_convert.artifact.adapter import BETA
from irq_convert.artifact.adapter_statistics import SCALE, TAU
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.errors import UsageError
from irq_convert.nn.linear import IrqLinear, dense_layer

if TYPE_CHECKING:
    from irq_convert.adapters.config import IecLoraConfig


OWN_PARTS = (BETA, SCALE, TAU)


class IecLoraLinear(MovesStatistics, LoraLinear):
    """PEFT's LoRA layer whose adapters are `IecVariant`s; on `IrqLinear`, `nn.Linear`, `Conv1D`."""

    in_features: int
    out_features: int
    lora_iec_beta: nn.ModuleDict
    rounded: torch.dtype | None
    """How moved statistics will be stored, where training is to take that into account."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.rounded: torch.dtype | None = None
        self._packed: list[IrqLinear] = []  # a list, so that it is no submodule
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; betas and moves of statistics get their place beside A and B.

        PEFT refuses a rank of 0, so a layer of statistics alone is made with 1 and emptied.
        """
        for name in OWN_PARTS:
            if name not in self.adapter_layer_names:
                self.adapter_layer_names = (*self.adapter_layer_names, name)
                setattr(self, name, nn.ModuleDict({}))
        rank, *others = args or (kwargs.pop("r"),)
        super().update_layer(adapter_name, rank or 1, *others, **kwargs)
        self.r[adapter_name] = rank

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base on its weight, or on one with moved statistics, and what adapters add."""
        moving = self._moving_now(kwargs.get("adapter_names"))
        if moving:
            base = self.get_base_layer()
            assert isinstance(base, IrqLinear)
            kwargs["q"] = self._moved(base, moving, rounded=self.rounded)
        return super().forward(x, *args, **kwargs)

    def parts(self, name: str) -> nn.ModuleDict:
        """One of `OWN_PARTS`, by adapter."""
        found = getattr(self, name)
        assert isinstance(found, nn.ModuleDict)
        return found

    def _moved(
        self,
        base: IrqLinear,
        names: Sequence[str],
        rounded: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> QuantizedTensor:
        return self._moved_weight(base.quantized(), "weight", names, rounded, dtype)

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
        """The change that `adapter` makes, `[rows, cols]` in the layout of the base weight."""
        variant, base = self._variant(adapter), self.get_base_layer()
        delta: Any = 0
        if variant.low_rank:
            dtype = weight_of(self.lora_B, adapter).dtype
            delta = variant.delta(self, adapter).to(dtype)
        if self._moving([adapter]):
            assert isinstance(base, IrqLinear)
            with torch.no_grad():
                q = self._moved(base, [adapter], dtype=torch.float32)
            delta = dequantize_tensor(q) - base.dequantize() + delta
        return delta.T if self.fan_in_fan_out else delta

    def _variant(self, adapter: str) -> IecVariant:
        variant = self.lora_variant[adapter]
        assert isinstance(variant, IecVariant)
        return variant

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base. A packed base is put aside, whole, for `unmerge`.

        Where all are pooled or of statistics alone the layer stays packed, with its statistics in
        float32; any other makes it dense. Raises `IrqError` when the result is not finite, or a
        scale is below 0.
        """
        base = self._packed[0] if self._packed else self.get_base_layer()
        if not isinstance(base, IrqLinear):
            super().merge(safe_merge, adapter_names)
            return
        found = check_adapters_to_merge(self, adapter_names) or ()
        names = [name for name in found if name in self.lora_variant]
        if not names:
            return
        every = [*self.merged_adapters, *names]
        variants = [self._variant(name) for name in every]
        with torch.no_grad():
            if all(v.block_size is not None or not v.low_rank for v in variants):
                merged: nn.Module = self._restated(base, every)
            else:
                merged = self._densify(base, every)
        self._packed = [base]
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

    def _restated(self, base: IrqLinear, names: list[str]) -> IrqLinear:
        """`base` with the statistics that `names` make of its own."""
        q = self._moved(base, self._moving(names), dtype=torch.float64)
        scale, tau = q.scale, q.tau
        for name in names:
            if self._variant(name).low_rank:
                tau = tau + self._variant(name).block_delta(self, name).double()
        require_finite(tau, names)
        require_scales(scale, names)
        moved = replace(base.quantized(), tau=tau.float(), tau_grid=None)
        if any(name in self.lora_irq_scale for name in names):
            moved = replace(moved, scale=scale.float(), scale_grid=None)
        layer = IrqLinear.from_quantized(moved)
        layer.fmt = replace(layer.fmt, transposed=base.fmt.transposed)
        layer.bias = base.bias  # itself: a new parameter would require gradients
        layer.dense_dtype = base.dense_dtype
        return layer.train(base.training)

    def _densify(self, base: IrqLinear, names: list[str]) -> nn.Module:
        moving = self._moving(names)
        q = self._moved(base, moving) if moving else base.quantized()
        if moving:
            require_scales(q.scale, moving)
        weight = dequantize_tensor(q)
        for name in names:
            if self._variant(name).low_rank:
                weight += self._variant(name).delta(self, name).to(weight.dtype)
        require_finite(weight, names)
        return dense_layer(base, nn.Parameter(weight.to(base.dense_dtype), requires_grad=False))

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.", "iec_lora.", 1)
