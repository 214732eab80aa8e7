"""The parts that make up one quantized tensor: suffixes of their names, shapes and dtypes.

The one list of them (formats/irq-v1.md, section 3): what files hold, what layers register and what
a `QuantizedTensor` carries follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from irq_convert.core.blocks import BlockShape
from irq_convert.core.statistic_dtypes import FLOAT32, STATISTIC_DTYPES, UINT8, StoredDtype

SUFFIXES = ("", "_scale", "_tau", "_scale_grid", "_tau_grid")
"""What follows the tensor's name: codes, statistics, and the grids of those that have one."""


@dataclass(frozen=True)
class Part:
    """One stored tensor."""

    shape: tuple[int, ...]
    dtype: StoredDtype


def part_shapes(blocks: BlockShape, leading: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of every part that there may be, by suffix, in the order of `SUFFIXES`.

    `leading` are the tensor's dimensions but the last, which `blocks` flattens to rows; grids run
    over all of them.
    """
    statistic, grid = (*leading, blocks.blocks_per_row), (blocks.groups, 2)
    shapes = ((*leading, blocks.row_bytes), statistic, statistic, grid, grid)
    return dict(zip(SUFFIXES, shapes, strict=True))


def stored_parts(
    blocks: BlockShape, leading: tuple[int, ...], scale_dtype: str, tau_dtype: str
) -> dict[str, Part]:
    """The parts of a tensor whose statistics are stored so, by suffix, in the order of a file.

    That order is codes, scale and tau, each grid behind its statistic. The dtypes are names of
    `STATISTIC_DTYPES`; others raise `KeyError`.
    """
    shapes = part_shapes(blocks, leading)
    parts = {"": Part(shapes[""], UINT8)}
    for suffix, name in (("_scale", scale_dtype), ("_tau", tau_dtype)):
        stored = STATISTIC_DTYPES[name]
        parts[suffix] = Part(shapes[suffix], stored)
        if stored.grid:
            parts[f"{suffix}_grid"] = Part(shapes[f"{suffix}_grid"], FLOAT32)
    return parts
