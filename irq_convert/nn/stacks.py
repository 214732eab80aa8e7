"""Stands in for the weights of many experts: gives one expert's product at a time, never a tensor.

A class of experts reads its weights as a stack of matrices, `weight[e]` or all at once with `bmm`.
These objects take the place of that stack inside the class's own forward. All they can do is
multiply an input; whatever else a forward tries is an error in one line, never a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from irq_convert.errors import IrqError

Linear = Callable[[torch.Tensor], torch.Tensor]
"""`x` `[..., inputs]` to `[..., outputs]`."""

_MATMUL = {
    torch.matmul,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
}
_BMM = {torch.bmm, torch.Tensor.bmm, *_MATMUL}


class ExpertMatrix:
    """The weight of one expert, cut by rows into `parts` that are multiplied one by one.

    `transposed`: the class takes it for `[inputs, outputs]` and computes `x @ weight`; otherwise
    it is `[outputs, inputs]` and goes to `functional.linear`.
    """

    def __init__(self, parts: Sequence[Linear], transposed: bool) -> None:
        self._parts = parts
        self._transposed = transposed

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        found = [part(x) for part in self._parts]
        y = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        return y if bias is None else y + bias.to(y.dtype)

    @property
    def T(self) -> ExpertMatrix:
        """The same weight seen the other way round."""
        return ExpertMatrix(self._parts, not self._transposed)

    def t(self) -> ExpertMatrix:
        """`T`."""
        return self.T

    def transpose(self, first: int, second: int) -> ExpertMatrix:
        """`T`; a matrix has no other."""
        if {first % 2, second % 2} != {0, 1}:
            raise _cannot(f"transpose({first}, {second})")
        return self.T

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        x, weight = given.get("input"), given.get("weight", args[1] if len(args) > 1 else None)
        if isinstance(weight, ExpertMatrix) and isinstance(x, torch.Tensor):
            if func is functional.linear and not weight._transposed:
                return weight.product(x, given.get("bias"))
            if func in _MATMUL and weight._transposed:
                return weight.product(x)
        raise _cannot(getattr(func, "__name__", str(func)))


class ExpertStack:
    """The weights of all experts, `shape` `[experts, ., .]` as the class takes them to be."""

    def __init__(
        self,
        expert: Callable[[int], Sequence[Linear]],
        shape: tuple[int, int, int],
        transposed: bool,
        like: torch.Tensor,
    ) -> None:
        """`expert(e)` gives the parts of one; `like` has the dtype and device to pretend."""
        self._expert = expert
        self._transposed = transposed
        self.shape = torch.Size(shape)
        self.dtype, self.device = like.dtype, like.device

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> ExpertMatrix:
        if isinstance(index, torch.Tensor) and index.numel() != 1:
            raise _cannot("indexing with several experts")
        number = int(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"expert {number} of {len(self)}")
        return ExpertMatrix(self._expert(number % len(self)), self._transposed)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        x, stack = args if len(args) == 2 else (None, None)
        if (
            func in _BMM
            and isinstance(x, torch.Tensor)
            and isinstance(stack, ExpertStack)
            and stack._transposed
            and x.dim() == 3
            and len(x) == len(stack)
            and not kwargs
        ):
            return torch.stack([stack[e].product(x[e]) for e in range(len(stack))])
        raise _cannot(getattr(func, "__name__", str(func)))


def _cannot(what: str) -> IrqError:
    return IrqError(
        f"this class of experts uses its weights in a way that packed ones do not serve ({what}): "
        "convert the model again with the experts left dense (--keep experts)"
    )
