"""The targets of `export` by name, imported when one is asked for.

What a target is called and how its result is loaded is a row of
`irq_convert.artifact.export_targets`; the module of its name in this folder writes it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from irq_convert.artifact.export_targets import TARGETS
from irq_convert.errors import UsageError

if TYPE_CHECKING:
    from irq_convert.jobs.export.target import Target


def find_target(name: str) -> Target:
    """The target called `name`; `UsageError` lists the known ones otherwise."""
    if name not in TARGETS:
        raise UsageError(f"--to {name}: choose one of {', '.join(TARGETS)}")
    own = f"{__package__}.{name.replace('-', '_')}"
    target: Target = import_module(TARGETS[name].module or own).TARGET
    return target
