"""Stock PEFT's tuners put on packed layers: those that cannot work there say so when they are.

A tuner that reads the dense weight is refused by the weight itself. Some fail otherwise, on its
shape or its dtype, in words that lead nowhere; those words get a sentence around them here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from irq_convert.errors import UsageError, one_line
from irq_convert.nn.experts import IrqExperts
from irq_convert.nn.guard import WAY_OUT
from irq_convert.nn.linear import IrqLinear


def explain_failures() -> None:
    """Have PEFT's injection of adapters raise `UsageError` for packed layers; idempotent."""
    stock: Any = BaseTuner.inject_adapter
    if hasattr(stock, "irq_convert"):
        return

    @functools.wraps(stock)
    def inject_adapter(
        self: Any, model: nn.Module, adapter_name: str, *args: Any, **kw: Any
    ) -> Any:
        try:
            result = stock(self, model, adapter_name, *args, **kw)
            _probe(model, adapter_name)
            return result
        except (RuntimeError, TypeError, ValueError) as error:
            packed = any(isinstance(m, IrqLinear | IrqExperts) for m in model.modules())
            if not packed or _is_pefts_own(error):
                raise
            kind = type(self).__name__.removesuffix("Model")
            raise UsageError(
                f"PEFT cannot put {kind} on these layers of a packed model ({one_line(error)}): "
                f"{WAY_OUT}"
            ) from error

    inject_adapter.irq_convert = True  # type: ignore[attr-defined]
    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]


def _is_pefts_own(error: Exception) -> bool:
    """Whether PEFT has refused what it would refuse on a dense model, in words that say it."""
    words = str(error)
    said = isinstance(error, ValueError) or words.startswith("trainable_token_indices cannot be")
    return said and not any(kind.__name__ in words for kind in (IrqLinear, IrqExperts))


def _probe(model: nn.Module, adapter_name: str) -> None:
    """Raise `RuntimeError` where a tuner has taken the shape of the codes for that of the weight.

    The smallest layer tells. Nothing is asked of LoRA, which goes by the layer's own sizes, nor of
    tuners whose change is no matrix.
    """
    layers = [module for module in _on_packed(model) if not isinstance(module, LoraLayer)]
    layer: Any = min(layers, key=lambda m: _sizes(m)[0] * _sizes(m)[1], default=None)
    if not hasattr(layer, "get_delta_weight") or any(p.is_meta for p in layer.parameters()):
        return
    try:
        with torch.no_grad():
            shape = tuple(layer.get_delta_weight(adapter_name).shape)
    except NotImplementedError:  # it never merges
        return
    except RuntimeError:
        raise
    except Exception:  # it wants something else, or has no such thing: the forward will tell
        return
    if shape != _sizes(layer):
        raise RuntimeError(f"its change is {list(shape)}, the layer {list(_sizes(layer))}")


def _sizes(layer: BaseTunerLayer) -> tuple[int, int]:
    base: Any = layer.get_base_layer()
    return base.out_features, base.in_features


def _on_packed(model: nn.Module) -> Iterator[BaseTunerLayer]:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), IrqLinear):
            yield module
