"""Telling a listener what the linear weights of a module are given and return, as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from irq_convert.nn.experts import eager_forward
from irq_convert.nn.stacks import ExpertStack

Listener = Callable[[str, int, torch.Tensor], None]
"""Called with a key, the number of the expert (0 for a linear) and its inputs `[..., cols]`, or
with what it returns, `[..., rows]`."""


@contextmanager
def linear_inputs(
    module: nn.Module, key: str, listener: Listener, outputs: Listener | None = None
) -> Iterator[None]:
    """Tell what a linear layer is given, as `key`, before it computes; and then its `outputs`."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        listener(key, 0, args[0])

    def after(_: nn.Module, args: tuple[Any, ...], found: torch.Tensor) -> None:
        if outputs is not None:
            outputs(key, 0, found)

    handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def expert_inputs(
    module: nn.Module,
    stacks: dict[str, tuple[str, bool]],
    listener: Listener,
    outputs: Listener | None = None,
) -> Iterator[None]:
    """Tell what each expert of a dense class of experts is given, and then its `outputs`.

    `stacks`: the key of each stacked parameter, by its name, and whether the class has it
    transposed. The class's own eager forward runs, one expert at a time.
    """
    forward = eager_forward(type(module))

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(_View(module, stacks, listener, outputs), *args, **kwargs)

    module.__dict__["forward"] = run
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)


class _View:
    """A module as its own forward sees it, with stand-ins for its stacks."""

    def __init__(
        self,
        module: nn.Module,
        stacks: dict[str, tuple[str, bool]],
        listener: Listener,
        outputs: Listener | None,
    ) -> None:
        self._module, self._stacks = module, stacks
        self._listener, self._outputs = listener, outputs

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name not in self._stacks:
            return found
        key, transposed = self._stacks[name]

        def multiply(number: int, x: torch.Tensor) -> torch.Tensor:
            self._listener(key, number, x)
            weight = found[number]
            y = x @ weight if transposed else functional.linear(x, weight)
            if self._outputs is not None:
                self._outputs(key, number, y)
            return y

        def expert(number: int) -> list[Callable[[torch.Tensor], torch.Tensor]]:
            return [partial(multiply, number)]

        return ExpertStack(expert, tuple(found.shape), transposed, found)
