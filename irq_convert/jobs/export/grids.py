"""Are the zero points of an artifact integers: decided from its scales and taus alone.

Those are a few percent of the file; codes are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from irq_convert.artifact.contents import read_part
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.reader import TileReader
from irq_convert.core.codebook import get_codebook
from irq_convert.core.scales import expand_statistic
from irq_convert.jobs.export.folder import tile_starts
from irq_convert.jobs.export.zero_points import zero_points
from irq_convert.progress import Progress


@dataclass(frozen=True)
class GridCheck:
    """Blocks of one tensor, and how many of them have no integer zero point."""

    blocks: int
    off: int


def check_grids(
    tensors: Sequence[StoredTensor], tile_weights: int, progress: Progress
) -> dict[str, GridCheck]:
    """By name; every block of a codebook that is not uniform is off the grid."""
    total = sum(_statistic_bytes(tensor) for tensor in tensors)
    progress.phase("reading zero points", len(tensors), total)
    found = {}
    with TileReader() as reader:
        for tensor in tensors:
            found[tensor.name] = _check(reader, tensor, tile_weights)
            progress.advance(_statistic_bytes(tensor), finished=True)
    return found


def _statistic_bytes(tensor: StoredTensor) -> int:
    return sum(info.nbytes for suffix, info in tensor.parts.items() if suffix)


def _check(reader: TileReader, tensor: StoredTensor, tile_weights: int) -> GridCheck:
    blocks = tensor.shape.blocks
    if not get_codebook(tensor.format.codebook).uniform:
        return GridCheck(blocks, blocks)
    off = 0
    for start, stop in tile_starts(tensor, 1, tile_weights):
        scale, tau = (
            expand_statistic(
                read_part(reader, tensor, suffix, start, stop),
                read_part(reader, tensor, f"{suffix}_grid", start, stop)
                if f"{suffix}_grid" in tensor.parts
                else None,
            )
            for suffix in ("_scale", "_tau")
        )
        off += int((~zero_points(scale, tau, tensor.shape.bits).exact).sum())
    return GridCheck(blocks, off)
