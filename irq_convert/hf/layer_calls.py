"""How a class calls its decoder layers, recorded: hidden states, and all that it gives besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class NotLayered(Exception):
    """The model cannot be run layer by layer; the message says why, in half a sentence."""


@dataclass(frozen=True)
class Call:
    """How the model calls a layer, besides the hidden states: the same for every window."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: str | None
    """The name under which hidden states are given, None when they are the first argument."""

    def run(self, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """The hidden states behind `layer`."""
        if self.keyword is None:
            found = layer(states, *self.args, **self.kwargs)
        else:
            found = layer(*self.args, **{self.keyword: states}, **self.kwargs)
        return _first_of(found)


def _first_of(found: Any) -> torch.Tensor:
    """The hidden states in what a layer returns: itself, or the first of several."""
    states = found[0] if isinstance(found, tuple | list) else found
    if not isinstance(states, torch.Tensor):
        raise NotLayered(f"a layer returns {type(states).__name__}, not hidden states")
    return states


class Enough(Exception):
    """All layers have been called."""


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, str | None]:
    """The hidden states that a layer is given, and under which keyword."""
    if args:
        return args[0], None
    return kwargs["hidden_states"], "hidden_states"


class Recorder:
    """Stands in for all layers: notes how they are called, and hands hidden states on."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._calls: list[Call] = []
        self._states: torch.Tensor | None = None

    def stub(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number != len(self._calls):
            raise NotLayered(f"its layers are not called one after the other ({number})")
        try:
            states, keyword = hidden_of(args, kwargs)
        except KeyError:
            raise NotLayered("its layers are not given hidden states") from None
        if not isinstance(states, torch.Tensor) or states.dim() != 3:
            raise NotLayered("its layers are not given one tensor of hidden states")
        if self._states is not None and states is not self._states:
            raise NotLayered("it changes hidden states between two layers")
        self._states = states
        rest = {name: value for name, value in kwargs.items() if name != keyword}
        self._calls.append(Call(args[1:] if keyword is None else args, rest, keyword))
        if len(self._calls) == self._count:
            raise Enough
        return states

    def finish(self) -> tuple[list[Call], torch.Tensor]:
        if self._states is None or len(self._calls) != self._count:
            raise NotLayered(f"it calls {len(self._calls)} of its {self._count} layers")
        return self._calls, self._states


def same_inputs(one: Any, other: Any) -> bool:
    """Whether two inputs of a layer are the same, tensors by value."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, tuple | list):
        same = isinstance(other, type(one)) and len(one) == len(other)
        return same and all(map(same_inputs, one, other))
    if isinstance(one, dict):
        same = isinstance(other, dict) and one.keys() == other.keys()
        return same and all(same_inputs(one[key], other[key]) for key in one)
    if one is None or isinstance(one, bool | int | float | str | torch.dtype):
        return bool(one == other)
    return type(one) is type(other)
