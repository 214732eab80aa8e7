"""Packed stacks of experts whose scale and tau are trained.

A stack has no layer for each expert, and so no place for matrices; its statistics are parameters
of the module, moved before the class's own forward reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from irq_convert.adapters.statistics import MovesStatistics, require_finite, require_scales
from irq_convert.artifact.adapter_statistics import SCALE, TAU, asks
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.errors import IrqError, UsageError
from irq_convert.nn.experts import Before, IrqExperts, Stacked


class StackMoves(nn.Module):
    """f or o of one adapter: by stack a parameter of its name, float32 `[experts * rows, blocks]`.

    A module, as `Moves` of a linear layer is.
    """

    def __init__(self, experts: IrqExperts) -> None:
        super().__init__()
        for name in stacks(experts):
            zeros = torch.zeros_like(experts.whole(name).scale, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(zeros))


def stacks(experts: IrqExperts) -> list[str]:
    """The parameters of `experts` that are packed stacks."""
    return [name for name, layout in experts.packed.items() if isinstance(layout, Stacked)]


class IecLoraExperts(MovesStatistics, nn.Module, LoraLayer):
    """PEFT's layer over `IrqExperts` with stacks; its adapters move their statistics."""

    adapter_layer_names = (SCALE, TAU)
    other_param_names = ()
    rounded: torch.dtype | None
    """How moved statistics will be stored, where training is to take that into account."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        nn.Module.__init__(self)  # not LoraLayer's own, which asks for the sizes of one matrix
        self.base_layer = base_layer
        self.lora_irq_scale, self.lora_irq_tau = nn.ModuleDict({}), nn.ModuleDict({})
        self.rounded = None
        self.merged_adapters: list[str] = []
        self.lora_A = nn.ModuleDict({})  # none: PEFT looks there for the names of adapters
        self.lora_embedding_A = nn.ParameterDict({})
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.lora_variant: dict[str, Any] = {}  # none: PEFT looks there when it deletes
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._before: dict[str, Before] = {}
        self.update_layer(adapter_name, **kwargs)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter that moves what its configuration says; 0 at the start.

        Raises `UsageError` for one with matrices.
        """
        config = kwargs["config"]
        if config.r > 0:
            raise UsageError(
                "target_modules names packed stacks of experts, which have statistics to train and "
                "no place for matrices: r=0, or leave them out"
            )
        base = self._experts()
        for name, part in ((SCALE, self.lora_irq_scale), (TAU, self.lora_irq_tau)):
            if asks(config.statistics, name):
                part[adapter_name] = StackMoves(base)
        self.r[adapter_name], self.scaling[adapter_name] = 0, 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _experts(self) -> IrqExperts:
        base = self.get_base_layer()
        assert isinstance(base, IrqExperts)
        return base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The experts as they are, or on the statistics that active adapters make of theirs.

        Raises `UsageError` where PEFT gives each row an adapter of its own and one is such.
        """
        base, names = self._experts(), self._moving_now(kwargs.pop("adapter_names", None))
        if not names:
            return base(*args, **kwargs)
        base.moved = {stack: self._moved(stack, names, self.rounded) for stack in stacks(base)}
        try:
            return base(*args, **kwargs)
        finally:
            base.moved = {}

    def _moved(
        self,
        stack: str,
        names: Sequence[str],
        rounded: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> QuantizedTensor:
        return self._moved_weight(self._experts().whole(stack), stack, names, rounded, dtype)

    def _checked(self, stack: str, names: Sequence[str]) -> QuantizedTensor:
        """What a stack becomes in float64; raises `IrqError` as `merge`."""
        with torch.no_grad():
            q = self._moved(stack, names, dtype=torch.float64)
        for values in (q.scale, q.tau):
            require_finite(values, names)
        require_scales(q.scale, names)
        return q

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the stacks, which stay packed, with moved statistics in float32.

        Raises `IrqError` when one is not finite, or a scale is below 0.
        """
        names = self._moving(check_adapters_to_merge(self, adapter_names) or ())
        if not names:
            return
        before, base = list(self.merged_adapters), self._experts()
        every = [*before, *names]
        if before:
            self.unmerge()
        try:
            found = {stack: self._checked(stack, every) for stack in stacks(base)}
        except IrqError:
            if before:
                self.merge(adapter_names=before)
            raise
        for stack, q in found.items():
            scale, tau = (
                values if any(name in part for name in every) else None
                for values, part in ((q.scale, self.lora_irq_scale), (q.tau, self.lora_irq_tau))
            )
            self._before[stack] = base.restate(stack, scale, tau)
        self.merged_adapters = every

    def unmerge(self) -> None:
        """Take merged adapters out again: the stacks come back bit for bit."""
        for stack, before in self._before.items():
            self._experts().put_back(stack, before)
        self._before.clear()
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.", "iec_lora.", 1)
