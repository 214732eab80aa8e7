"""Stand-ins for the few names of vLLM that the plugin's methods are built on.

Not its behaviour: that is for tests/bench/serve_check.py, with vLLM itself. Of base classes only
that they are there; of layers the attributes that vLLM 0.32 gives them.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

LINEAR = "vllm.model_executor.layers.linear"
BASE = "vllm.model_executor.layers.quantization.base_config"
QUANTIZATION = "vllm.model_executor.layers.quantization"


class Base:
    """A base class without anything."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


def stand_in(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make `vllm` importable for a test; what was registered, by name."""
    registered: dict[str, Any] = {}

    def register(name: str) -> Any:
        def keep(cls: Any) -> Any:
            registered[name] = cls
            return cls

        return keep

    names = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: None},
        "vllm.version": {"__version__": "0.32.0"},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        LINEAR: {"LinearMethodBase": Base},
        QUANTIZATION: {"register_quantization_config": register},
        BASE: {"QuantizationConfig": Base, "QuantizeMethodBase": Base},
    }
    for name, values in names.items():
        module = ModuleType(name)
        vars(module).update(values)
        patch.setitem(sys.modules, name, module)
    for name in ("config", "linear", "tables"):
        patch.delitem(sys.modules, f"irq_convert.vllm.{name}", raising=False)
    return registered


def forget(patch: pytest.MonkeyPatch) -> None:
    """Drop the modules that were built on stand-ins."""
    for name in ("config", "linear", "tables"):
        sys.modules.pop(f"irq_convert.vllm.{name}", None)


def layer(kind: str, rank: int, ranks: int, **more: Any) -> nn.Module:
    """A layer of the class called `kind`, as far as the methods look at one."""
    made = type(kind, (nn.Module,), {})()
    vars(made).update(tp_rank=rank, tp_size=ranks, params_dtype=torch.float32, **more)
    return made


def table(vocabulary: int, rank: int, ranks: int, padded: int) -> nn.Module:
    """An embedding whose rows are padded to `padded` and split."""
    own = padded // ranks
    begin, end = (min(edge, vocabulary) for edge in (rank * own, (rank + 1) * own))
    indices = SimpleNamespace(org_vocab_start_index=begin, org_vocab_end_index=end)
    return layer(
        "ParallelLMHead", rank, ranks, shard_indices=indices, num_embeddings_per_partition=own
    )
