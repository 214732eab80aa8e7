"""Artifacts as transformers models: the quantizer "irq" and `load`, the short way to a model.

Names come from their modules when they are first used, because `autoload` lives here and has to
stay cheap to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irq_convert.hf.config import IrqConfig
    from irq_convert.hf.loading import load
    from irq_convert.hf.quantizer import IrqQuantizer

__all__ = ["IrqConfig", "IrqQuantizer", "load"]

_HOMES = {
    "IrqConfig": "irq_convert.hf.config",
    "IrqQuantizer": "irq_convert.hf.quantizer",
    "load": "irq_convert.hf.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
