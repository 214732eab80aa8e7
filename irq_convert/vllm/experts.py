"""Experts of mixtures that the files hold one by one. Imports vLLM."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    apply_moe_activation,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from irq_convert.core.parts import SUFFIXES
from irq_convert.errors import IrqError
from irq_convert.vllm.held import HeldWeights, Piece
from irq_convert.vllm.held_experts import HeldExperts
from irq_convert.vllm.linear import is_dummy
from irq_convert.vllm.modules import StoredModules
from irq_convert.vllm.shards import Shard

_OWN = ".routed_experts"
"""What vLLM may put after the name that the files have for all experts of a layer."""


def experts_method(modules: StoredModules, layer: Any, prefix: str) -> IrqExpertsMethod | None:
    """The method for the experts `prefix`; None where they are dense.

    Raises `IrqError`, naming them, for experts that are stacked in one tensor, have biases, or are
    packed and could not be looked up in the files.
    """
    prefix = prefix.removesuffix(_OWN)
    if modules.packed is None:
        raise IrqError(
            f"{prefix}: the headers of the model's files could not be read, which tell what of a "
            "mixture is packed: serve it from a folder"
        )
    packed = [name for name in modules.packed if name.startswith(f"{prefix}.")]
    if not packed:
        return None
    single = next((n for n in packed if not n.removeprefix(f"{prefix}.")[:1].isdigit()), None)
    if single is not None:
        raise IrqError(
            f"{single} is of all experts in one tensor, which vLLM takes apart as it loads: "
            "convert with the experts left dense (--keep), or export --to dense"
        )
    if layer.moe_config.has_bias:
        raise IrqError(f"{prefix}: packed experts with biases are not served: export --to dense")
    return IrqExpertsMethod(modules, layer, prefix)


class IrqExpertsMethod(FusedMoEMethodBase):
    """Products of each expert with the tokens that chose it."""

    def __init__(self, modules: StoredModules, layer: Any, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.modules = modules
        self.prefix = prefix
        self.empty = False

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, *others: Any
    ) -> tuple[int, int]:
        """The sizes of the files: packed rows cannot be padded."""
        return hidden_size, intermediate_size_per_partition

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Plan what the rank holds of every expert; parameters take tensors as they come."""
        self.empty = is_dummy()
        size = intermediate_size_per_partition
        span = (self.moe.tp_rank * size, (self.moe.tp_rank + 1) * size)
        names = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name]
        first, second = [], []
        for expert in _local_experts(layer):
            upper = tuple(
                self._piece(f"{expert}.{name}", hidden_size, Shard((span,)))
                for name in names
                if name is not None
            )
            whole = size * self.moe.tp_size
            columns = None if self.moe.tp_size == 1 else span
            shard = Shard(((0, hidden_size),), columns)
            lower = self._piece(f"{expert}.{layer.ckpt_down_proj_name}", whole, shard)
            first.append(HeldWeights(upper, params_dtype))
            second.append(HeldWeights((lower,), params_dtype))
        layer.irq = HeldExperts(self.prefix, first, second, _activation(layer))
        for suffix in SUFFIXES:
            for name in ("w13", "w2"):
                empty = torch.nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
                empty.weight_loader = partial(_take, layer, suffix)  # type: ignore[attr-defined]
                layer.register_parameter(f"{name}_weight{suffix}", empty)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises `IrqError` naming a tensor that the files lack."""
        layer.irq.finish(self.empty)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's kernels for mixtures are not used."""
        return

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x` `[tokens, cols]` to `[tokens, cols]`; shared experts are the runner's to add."""
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        found: torch.Tensor = layer.irq(x, topk_weights, ids)
        return found

    def _piece(self, name: str, cols: int, shard: Shard) -> Piece:
        whole = f"{self.prefix}.{name}"
        return Piece(whole, cols, shard, self.modules.format_of(whole))


def _local_experts(layer: Any) -> list[int]:
    """Numbers of the experts that this rank holds, in the order of their local numbers."""
    if layer.expert_map is None:
        return list(range(layer.local_num_experts))
    numbers = layer.expert_map.tolist()
    local = {own: number for number, own in enumerate(numbers) if own >= 0}
    return [local[own] for own in sorted(local)]


def _activation(layer: Any) -> Any:
    moe, kind = layer.moe_config, layer.activation
    config = ApplyMoEActivationConfig(
        clamp_limit=moe.swiglu_limit,
        alpha=1.0 if moe.swiglu_alpha is None else moe.swiglu_alpha,
        beta=0.0 if moe.swiglu_beta is None else moe.swiglu_beta,
    )

    def run(hidden: torch.Tensor) -> torch.Tensor:
        width = hidden.shape[-1] // (2 if moe.is_act_and_mul else 1)
        found = hidden.new_empty(hidden.shape[0], width)
        apply_moe_activation(kind, found, hidden, activation_config=config)
        return found

    return run


def _take(
    layer: Any,
    suffix: str,
    param: Any,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """A parameter's `weight_loader`: `shard_id` is w1, w2 or w3; False for what others hold."""
    own = layer._map_global_expert_id_to_local_expert_id(expert_id)
    if own != -1:
        held = layer.irq.second[own] if shard_id == "w2" else layer.irq.first[own]
        number = 1 if shard_id == "w3" else 0
        held.take(number, suffix, loaded_weight)
    return (own != -1) if return_success else None
