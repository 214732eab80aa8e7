"""Input embeddings and output heads that can be quantized, when asked: which, and why not.

A table is asked for its rows alone, or is also the head of the model, under a second name. It is
quantized when all that share it can be held packed: `nn.Embedding` and classes that scale its rows,
and `nn.Linear`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from irq_convert.artifact.config import module_name
from irq_convert.errors import IrqError
from irq_convert.hf.tied import tied_groups


@dataclass(frozen=True)
class Tables:
    """`tensors` of the files to quantize, by the modules of the model that they are the weight of.

    `reasons` says of other tensors of embeddings and heads why they are none, in half a sentence.
    `apart`: the class ties the two, and the files have a tensor for each, which is quantized for
    itself.
    """

    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False

    @property
    def modules(self) -> set[str]:
        """All modules of the model that get a packed weight."""
        return {module for modules in self.tensors.values() for module in modules}


def find_tables(model: Any, stored: Mapping[str, str], precise: Any) -> Tables:
    """The input embeddings and the output head of `model`, on meta.

    `stored` has the tensor of the files by the module of the model; `precise` matches weights that
    the class wants in full precision.
    """
    found: dict[str, tuple[str, ...]] = {}
    reasons: dict[str, str] = {}
    groups, apart = tied_groups(model), False
    for name in filter(None, ends(model)):
        keys = next((g for g in groups if f"{name}.weight" in g), frozenset({f"{name}.weight"}))
        modules = tuple(sorted(module_name(key) for key in keys))
        there = {module: stored[module] for module in modules if module in stored}
        if len(there) == len(modules) == 2:
            modules, there, apart = (name,), {name: stored[name]}, True
        why = _why_not(model, modules, precise)
        if why is None and len(there) > 1:
            why = f"the files have it {len(there)} times"
        for tensor in there.values():
            if why is not None:
                reasons[tensor] = why
            else:
                found[tensor] = modules
    return Tables(found, reasons, apart)


def ends(model: Any) -> tuple[str | None, str | None]:
    """Names of the input embeddings and the output head, None for what the class does not have."""
    names = {id(module): name for name, module in model.named_modules()}

    def named(ask: Callable[[], Any]) -> str | None:
        try:
            return names.get(id(ask()))
        except (NotImplementedError, AttributeError):
            return None

    return named(model.get_input_embeddings), named(model.get_output_embeddings)


def _why_not(model: Any, modules: tuple[str, ...], precise: Any) -> str | None:
    twice = _named_twice(model)
    for name in modules:
        module = model.get_submodule(name)
        if precise.search(f"{name}.weight"):
            return "the class wants it in float32"
        if id(module) in twice:
            return "the class has it as a part of several modules"
        if not (is_table(module) or type(module) is nn.Linear):
            return f"{type(module).__name__} does more than look rows up"
    return None


def _named_twice(model: Any) -> set[int]:
    seen: set[int] = set()
    twice: set[int] = set()
    for _, module in model.named_modules(remove_duplicate=False):
        (twice if id(module) in seen else seen).add(id(module))
    return twice


def is_table(module: nn.Module) -> bool:
    """Whether `module` looks rows up, and at most multiplies all of them by the same."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    cls: Any = type(module)
    return cls is nn.Embedding or _only_scales(cls)


def check_tied(model: Any, tensor: str, modules: Iterable[str], others: set[str | None]) -> None:
    """Raise `IrqError` where packed `tensor` is tied to one of `modules` that cannot hold it.

    Or to one of `others`, a tensor that the files have besides.
    """
    for name in modules:
        module = model.get_submodule(name)
        if not is_table(module) and type(module) is not nn.Linear:
            raise IrqError(
                f"{tensor} is quantized, and {type(model).__name__} ties it to {name}, a "
                f"{type(module).__name__}: convert the model again with this tensor left dense"
            )
    own = sorted(other for other in others if other is not None)
    if own:
        raise IrqError(
            f"{tensor} is quantized and {own[0]} is in the files, too, but {type(model).__name__} "
            "ties the two to a third: convert the model again with these tensors left dense"
        )


@functools.cache
def _only_scales(cls: Any) -> bool:
    """Whether the forward of `cls` is `super().forward(ids) * <something of self>`, by its code."""
    if cls.__mro__[1] is not nn.Embedding:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 2:
        return False
    body = [each for each in function.body if not _is_text(each)]
    returned = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None
    if not isinstance(returned, ast.BinOp) or not isinstance(returned.op, ast.Mult):
        return False
    ids = function.args.args[1].arg
    looks = ast.unparse(returned.left) == f"super().forward({ids})"
    scale = {node.id for node in ast.walk(returned.right) if isinstance(node, ast.Name)}
    return looks and scale == {"self"}


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
