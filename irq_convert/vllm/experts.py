"""Experts of mixtures."""

from __future__ import annotations

from typing import Any

from irq_convert.errors import IrqError


def experts_method(modules: Any, layer: Any, prefix: str) -> Any:
    if modules.packed is not None and not any(n.startswith(prefix) for n in modules.packed):
        return None
    raise IrqError(f"{prefix}: experts")
