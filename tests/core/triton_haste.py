"""Triton's interpreter in fewer operations: it takes its time an operation, not an element.

`tl.sort` and the adding up of groups are replaced, the language is not patched again for every call
of a function, all candidates of a block are scored in one step, and fewer shrink factors are tried.
`REAL` puts back what the device runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from irq_convert.core import search_plan
from irq_convert.core.blocks import GROUP_SIZE
from irq_convert.core.triton import quantize as driver
from irq_convert.core.triton import totals


def sort_at_once(x: Any, dim: int, descending: bool = False) -> Any:
    sorted_ = np.sort(x.handle.data, axis=dim)
    return tl.tensor(interpreter.TensorHandle(sorted_, x.handle.dtype), x.type)


class AddUpAtOnce:
    """`totals.add_up` on tensors, each float64 sum from the first block to the last."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.add_up

    def add_up(
        self, sums: torch.Tensor, energies: torch.Tensor, bad: torch.Tensor, counts: torch.Tensor,
        results: torch.Tensor, blocks: int, groups: int, **options: Any,
    ) -> None:  # fmt: skip
        for group in range(groups):
            part = slice(group * GROUP_SIZE, min(blocks, (group + 1) * GROUP_SIZE))
            whole = [row.view(-1)[:blocks][part].sum() for row in (*_two(sums, blocks), bad)]
            counts[group] = torch.stack(whole)
            added = [np.cumsum(row[part].numpy())[-1] for row in _two(energies, blocks)]
            results[group] = torch.tensor(added, dtype=torch.float64)


def _two(rows: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two rows of `blocks` that a kernel sees in a buffer."""
    flat = rows.view(-1)
    return flat[:blocks], flat[blocks : 2 * blocks]


@cache
def languages(function: Any) -> list[Any]:
    seen = function.fn.__globals__.values()
    return [lang for lang in (tl, tl.core) if any(value is lang for value in seen)]


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function from a kernel."""
    if any(tl.core.is_builtin(lang.arange) for lang in languages(function)):
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


HASTY = (
    (tl, "sort", sort_at_once),
    (totals, "add_up", AddUpAtOnce()),
    (search_plan, "SHRINKS", (1.0, 0.8, 0.6)),
    (driver, "NARROW", 128),
    (driver, "WIDE", 256),
    (driver, "SCORES", 1024),
)
REAL = {name: (owner, name, getattr(owner, name)) for owner, name, _ in HASTY}


@contextmanager
def in_fewer_operations() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        for owner, name, value in HASTY:
            patch.setattr(owner, name, value)
        yield
