"""`PackedCodes`: the codes of a packed weight, as whoever asks a layer for its weight gets them.

The parameter itself is a plain one, so moving, loading, saving, copying and sharding see nothing
of this. What `layer.weight` gives shares its memory and can be looked at, moved and copied. Taken
for a dense weight, it refuses: codes multiplied by a number are bytes without a meaning, which
would be saved like any others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from irq_convert.errors import UsageError

WAY_OUT = (
    "merge a saved LoRA or IEC-LoRA with irq-convert merge; for anything else make the model dense "
    "first, with irq-convert export --to dense"
)
_DATA: Any = torch.Tensor.data
# With another tensor beside them: comparing, choosing, and putting codes side by side.
_WITH_TENSORS = {
    *("eq", "ne", "__eq__", "__ne__", "equal", "allclose", "isclose", "is_same_size"),
    *("__getitem__", "index_select", "gather", "take", "cat", "concat", "stack"),
    *("assert_close", "_has_compatible_shallow_copy_type", "_is_view", "is_set_to"),
}
_MOVES = {"to", "cpu", "cuda"}
_IN_PLACE = {"detach_", "share_memory_", "retain_grad_", "rename_"}
_OPERATORS = {
    *("__iadd__", "__isub__", "__imul__", "__imatmul__", "__itruediv__", "__ifloordiv__"),
    *("__idiv__", "__imod__", "__ipow__", "__ilshift__", "__irshift__", "__iand__", "__ior__"),
    "__ixor__",
}


class PackedCodes(torch.Tensor):
    """Codes that refuse to be a dense weight. `weight` says whose they are, for people."""

    weight: str
    of_parameter: weakref.ref[nn.Parameter] | None

    @classmethod
    def of(cls, parameter: nn.Parameter, weight: str) -> PackedCodes:
        """What stands for `parameter`, the codes of `weight`, when a layer is asked for it.

        The same object while the parameter lies where it does: some tell tensors apart by `id`.
        """
        made = _KNOWN.get(parameter)
        if made is None or _place(made) != _place(parameter):
            made = _KNOWN[parameter] = _wrapped(parameter.detach(), weight)
        made.__dict__.update(parameter.__dict__, weight=weight, of_parameter=weakref.ref(parameter))
        made.__dict__["_is_param"] = True  # what torch knows a parameter by
        return made

    @property
    def parameter(self) -> nn.Parameter | None:
        """What this stands for; None for a part, a view or a copy."""
        return None if self.of_parameter is None else self.of_parameter()

    def __setattr__(self, name: str, value: Any) -> None:
        """Marks that libraries put on a parameter go to the parameter."""
        super().__setattr__(name, value)
        if self.parameter is not None and not hasattr(torch.Tensor, name):
            setattr(self.parameter, name, value)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """`func` on plain tensors; what it gives of codes refuses again.

        Raises `UsageError` where `func` writes to codes, computes with them and another tensor,
        or makes floating-point numbers of them.
        """
        kwargs = kwargs or {}
        codes = next(_codes((args, kwargs)))
        name = _name(func)
        if name.startswith("data =") and args[0] is codes:
            return _replace(codes, args[1])
        if not _is_sound(func, name, args, kwargs):
            raise refusal(codes.weight, name)
        with torch._C.DisableTorchFunctionSubclass():
            try:
                result = func(*_plain(args), **_plain(kwargs))
            except RuntimeError as error:  # of a shape that the dense weight would have
                raise refusal(codes.weight, name) from error
        if name.startswith(("new_", "__reduce")) or name.endswith("_like"):
            return result
        if name in _MOVES and result.device != codes.device:  # for others to register
            return result
        return _guarded(result, codes.weight, name)


_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and in what layout."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def refusal(weight: str, what: str) -> UsageError:
    """The line for whoever did `what` to the codes of `weight`."""
    return UsageError(
        f"{weight} is packed and was taken for a dense weight ({what}): it was left as it is; "
        f"{WAY_OUT}"
    )


def unguarded(value: Any) -> Any:
    """The parameter that a `PackedCodes` stands for; any other value itself."""
    if not isinstance(value, PackedCodes):
        return value
    known = value.parameter
    return nn.Parameter(_plain(value), requires_grad=False) if known is None else known


def guarded_parameter(parameter: Any, weight: str) -> Any:
    """`parameter` guarded where it is one of codes in plain memory and nobody traces."""
    if torch.compiler.is_compiling() or type(parameter) is not nn.Parameter:
        return parameter
    return PackedCodes.of(parameter, weight)


def _wrapped(tensor: torch.Tensor, weight: str) -> PackedCodes:
    made = tensor.as_subclass(PackedCodes)
    made.__dict__.update(weight=weight, of_parameter=None)
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, PackedCodes):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(torch.Tensor)
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if type(value) is dict:
        return {key: _plain(each) for key, each in value.items()}
    return value


def _codes(value: Any) -> Iterator[PackedCodes]:
    return (each for each in _tensors(value) if isinstance(each, PackedCodes))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _name(func: Callable[..., Any]) -> str:
    """What `func` is called; "data =" of a property that is set."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        of = getattr(getattr(func, "__self__", None), "__name__", "attribute")
        return of if name == "__get__" else f"{of} ="
    return name


def _is_sound(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether `func` leaves codes as they are and takes them for nothing else."""
    if name in ("requires_grad_", "requires_grad ="):
        return not (args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
    others = [each for each in _tensors((args, kwargs)) if not isinstance(each, PackedCodes)]
    if name in ("copy_", "set_"):
        mine = args[0]
        return all((each.dtype, each.shape) == (mine.dtype, mine.shape) for each in others)
    written = isinstance(args[0], PackedCodes) if args else False
    in_place = name.endswith("_") and not name.endswith("__")
    if (in_place and name not in _IN_PLACE) or name in _OPERATORS or name == "__setitem__":
        return not written and not any(each.is_floating_point() for each in others)
    if any(True for _ in _codes(kwargs.get("out"))):
        return False
    if name.endswith(" =") or not others:
        return True
    return name in _WITH_TENSORS


def _replace(codes: PackedCodes, data: Any) -> None:
    """`codes.data = data`: other codes of the same layout, or nothing."""
    same = isinstance(data, torch.Tensor) and (data.dtype, data.shape) == (
        codes.dtype,
        codes.shape,
    )
    if not same:
        raise refusal(codes.weight, "data =")
    data = _plain(data)
    if codes.parameter is not None:
        codes.parameter.data = data
    with torch._C.DisableTorchFunctionSubclass():
        _DATA.__set__(codes, data)


def _guarded(result: Any, weight: str, name: str) -> Any:
    """What a function made of codes: codes are guarded, floating-point numbers refused."""
    if type(result) in (list, tuple):
        return type(result)(_guarded(each, weight, name) for each in result)
    if not isinstance(result, torch.Tensor):
        return result
    if result.is_floating_point() or result.is_complex():
        raise refusal(weight, name)
    return _wrapped(result, weight) if result.dtype == torch.uint8 else result
