"""Outputs of modules that will not change any more, kept while a layer is run again and again.

A layer is run once for each group of weights. Once the weights of a module are solved, its output
for a chunk of windows is known and need not be computed again, whatever it does between its
weights. What finds no room is computed again: results are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from irq_convert.jobs.calibration.sites import Site

ROOM = 256 << 20
"""Bytes of outputs that are kept at most."""


class Memo:
    """Outputs by the name of a module and the first window of a chunk."""

    def __init__(self, layer: nn.Module, prefix: str, sites: Sequence[Site]) -> None:
        """`sites`: the weights of `layer` that are solved one after another; `prefix` its name."""
        self._layer, self._left = layer, ROOM
        self._kept: dict[str, dict[int, Any]] = {}
        self._prefix = f"{prefix}."
        self._unsolved = {self._inner(site.key) for site in sites}
        linears = [self._inner(site.module) for site in sites if not site.stacked]
        children = {key.split(".")[0] for key in self._unsolved}
        # The layer's own children first: what they keep makes what their parts keep needless.
        self._modules = [*sorted(children), *(name for name in linears if name not in children)]

    def _inner(self, name: str) -> str:
        return name.removeprefix(self._prefix)

    def solved(self, site: Site) -> None:
        """Its weights are final."""
        self._unsolved.discard(self._inner(site.key))

    @contextmanager
    def used(self, start: int) -> Iterator[None]:
        """Take known outputs from here, and keep new ones, for the chunk that begins at `start`."""
        with ExitStack() as stack:
            for name in self._modules:
                if not any(key.startswith(f"{name}.") for key in self._unsolved):
                    stack.enter_context(self._standing_in(name, start))
            yield

    @contextmanager
    def _standing_in(self, name: str, start: int) -> Iterator[None]:
        module = self._layer.get_submodule(name)
        before = module.__dict__.get("forward")
        compute = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            kept = self._kept.setdefault(name, {})
            if start not in kept:
                found = compute(*args, **kwargs)
                self._forget_parts(name, start)
                size = _bytes(found)
                if size is None or size > self._left:
                    return found
                self._left -= size
                kept[start] = found
            return kept[start]

        module.__dict__["forward"] = forward
        try:
            yield
        finally:
            module.__dict__.pop("forward")
            if before is not None:
                module.__dict__["forward"] = before

    def _forget_parts(self, name: str, start: int) -> None:
        for part, kept in self._kept.items():
            if part.startswith(f"{name}.") and start in kept:
                self._left += _bytes(kept.pop(start)) or 0


def _bytes(found: Any) -> int | None:
    """Bytes of an output, None for what is no tensor and no tuple of tensors."""
    parts = found if isinstance(found, tuple) else (found,)
    if not all(part is None or isinstance(part, torch.Tensor) for part in parts):
        return None
    return sum(part.nbytes for part in parts if part is not None)
