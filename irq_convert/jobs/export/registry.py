"""The targets of `export` by name, imported when one is asked for.

A further target is a module that sets `TARGET` (see `irq_convert.jobs.export.target.Target`), and
a line here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from irq_convert.errors import UsageError

if TYPE_CHECKING:
    from irq_convert.jobs.export.target import Target

TARGETS = {
    "dense": "irq_convert.jobs.export.dense",
    "mlx": "irq_convert.jobs.export.mlx",
    "gguf": "irq_convert.jobs.export.gguf",
    "compressed-tensors": "irq_convert.jobs.export.compressed_tensors",
}
"""Name on the command line to the module that sets `TARGET`."""


def find_target(name: str) -> Target:
    """The target called `name`; `UsageError` lists the known ones otherwise."""
    if name not in TARGETS:
        raise UsageError(f"--to {name}: choose one of {', '.join(TARGETS)}")
    target: Target = import_module(TARGETS[name]).TARGET
    return target
