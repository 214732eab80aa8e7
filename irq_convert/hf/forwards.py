"""What a class of experts does with its stacked weights, read from the source of its methods.

Packed experts can multiply, one expert at a time, and nothing else. Whether that is all that a
class asks of them is seen in its code, so that a new class needs no list, and one that does more
stays dense instead of failing when it runs.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

_LOOKS = {"shape", "dtype", "device", "ndim", "size"}
"""Attributes that a stand-in has."""


@functools.cache
def orientation(cls: Any, parameter: str) -> bool | None:
    """How `cls` multiplies with `parameter`: False for `linear(x, weight[e])`, True for `@`.

    True also for `bmm(x, weight)`, which takes all experts at once. None where it is used in any
    other way, in both, or not at all, or where there is no source to read.
    """
    found: set[bool | None] = set()
    try:
        for method in _methods(cls):
            found |= set(_uses(ast.parse(textwrap.dedent(inspect.getsource(method))), parameter))
    except (OSError, TypeError, SyntaxError):
        return None
    return found.pop() if len(found) == 1 else None


def _methods(cls: type[nn.Module]) -> Iterator[FunctionType]:
    """The methods of `cls` that run, and not those of `nn.Module` itself."""
    for base in cls.__mro__:
        if base is nn.Module:
            return
        for name, value in vars(base).items():
            if inspect.isfunction(value) and not name.startswith("__"):
                method = inspect.unwrap(value)
                assert isinstance(method, FunctionType)
                yield method


def _uses(tree: ast.AST, parameter: str) -> Iterator[bool | None]:
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        own = isinstance(node, ast.Attribute) and node.attr == parameter
        if own and isinstance(node.value, ast.Name) and node.value.id == "self":  # type: ignore[attr-defined]
            parent = parents[node]
            looks = isinstance(parent, ast.Attribute) and parent.attr in _LOOKS
            if not looks and not _is_none(parent):
                yield _use(node, parent, parents)


def _is_none(node: ast.AST) -> bool:
    """`weight is None` and the like."""
    return (
        isinstance(node, ast.Compare)
        and all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
        and all(isinstance(c, ast.Constant) and c.value is None for c in node.comparators)
    )


def _use(node: ast.AST, parent: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool | None:
    if _is_second(node, parent, "bmm"):
        return True
    if not isinstance(parent, ast.Subscript) or parent.value is not node:
        return None
    if isinstance(parent.slice, ast.Slice | ast.Tuple):
        return None
    outer = parents[parent]
    if _is_second(parent, outer, "linear"):
        return False
    if isinstance(outer, ast.BinOp) and isinstance(outer.op, ast.MatMult):
        return True if outer.right is parent else None
    return None


def _is_second(node: ast.AST, call: ast.AST, name: str) -> bool:
    """Whether `node` is the second argument of a function called `name`."""
    if not isinstance(call, ast.Call) or len(call.args) < 2 or call.args[1] is not node:
        return False
    func = call.func
    called = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", None)
    return called == name
