"""Mean squares of what linear weights are given, by hooks on the whole model and plain formulas.

Nothing of the package is used: transformers runs the model, and what its experts compute is written
out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def mean_squares(model: Any, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """By module: `[cols]` of a linear layer; of experts `[experts, cols]`, ".up" and ".down"."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}

    def add(name: str, rows: torch.Tensor, matrix: int = 0, matrices: int = 1) -> None:
        total = sums.setdefault(name, torch.zeros(matrices, rows.shape[-1], dtype=torch.float64))
        flat = rows.reshape(-1, rows.shape[-1]).double()
        total[matrix] += flat.square().sum(0)
        counts.setdefault(name, torch.zeros(matrices, dtype=torch.float64))[matrix] += len(flat)

    def linear(name: str) -> Callable[..., None]:
        return lambda module, args: add(name, args[0])

    def experts(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            states, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
            number = len(module.gate_up_proj)
            for expert in range(number):
                mine = states[(chosen == expert).any(-1)]
                add(f"{name}.up", mine, expert, number)
                gate, up = (mine @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                add(f"{name}.down", nn.functional.silu(gate) * up, expert, number)

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            handles.append(module.register_forward_pre_hook(linear(name)))
        elif hasattr(module, "gate_up_proj") and name.endswith("experts"):
            handles.append(module.register_forward_pre_hook(experts(name)))
    with torch.no_grad():
        for window in ids:
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return {
        name: (sums[name] / counts[name].clamp(min=1)[:, None]).squeeze(0).numpy() for name in sums
    }
