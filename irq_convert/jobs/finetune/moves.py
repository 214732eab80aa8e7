"""What is particular to training statistics: which parameters, how low a scale, seen as stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from irq_convert.adapters.experts import IecLoraExperts
from irq_convert.adapters.layer import IecLoraLinear
from irq_convert.artifact.adapter_statistics import SCALE, TAU


def moves_of(model: Any, *names: str) -> Iterator[nn.Parameter]:
    """The trained moves of scale and tau, or the trained parts called `names`."""
    wanted = names or (SCALE, TAU)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(part in wanted for part in name.split(".")):
            yield parameter


def lowest_scale(model: Any) -> float:
    """The smallest factor that a scale is multiplied by; 1 where none is trained."""
    lowest = [parameter.detach().min() for parameter in moves_of(model, SCALE)]
    return 1.0 if not lowest else 1 + float(torch.stack(lowest).min())


def round_statistics(model: Any, stored: torch.dtype = torch.uint8) -> None:
    """Have every layer compute with moved statistics as they will be `stored`."""
    for module in model.modules():
        if isinstance(module, IecLoraLinear | IecLoraExperts):
            module.rounded = stored
