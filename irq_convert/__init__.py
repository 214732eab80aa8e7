"""Quantize language models to 2, 3 or 4 bits, load them back, and keep them trainable.

Importing the package is cheap: names come from their modules when they are first used. It also
teaches transformers the quantization method "irq" as soon as transformers is imported, so that
`AutoModelForCausalLM.from_pretrained` reads an artifact directly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from irq_convert import autoload

if TYPE_CHECKING:
    from irq_convert.adapters.attach import attach, prepare_for_training
    from irq_convert.adapters.config import IecLoraConfig
    from irq_convert.core.dequantize import dequantize_tensor
    from irq_convert.core.quantize import quantize_tensor
    from irq_convert.core.quantized import QuantizedTensor
    from irq_convert.core.spec import QuantSpec
    from irq_convert.errors import IrqError, UsageError
    from irq_convert.hf.loading import load

__version__ = "0.1.0"

__all__ = [
    "IecLoraConfig",
    "IrqError",
    "QuantSpec",
    "QuantizedTensor",
    "UsageError",
    "__version__",
    "attach",
    "dequantize_tensor",
    "load",
    "prepare_for_training",
    "quantize_tensor",
]

_HOMES = {
    "IecLoraConfig": "irq_convert.adapters.config",
    "IrqError": "irq_convert.errors",
    "QuantSpec": "irq_convert.core.spec",
    "QuantizedTensor": "irq_convert.core.quantized",
    "UsageError": "irq_convert.errors",
    "attach": "irq_convert.adapters.attach",
    "dequantize_tensor": "irq_convert.core.dequantize",
    "load": "irq_convert.hf.loading",
    "prepare_for_training": "irq_convert.adapters.attach",
    "quantize_tensor": "irq_convert.core.quantize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


autoload.install()
