"""A quantized matrix in memory: the parts of format "irq", with their geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from irq_convert.core.blocks import BlockShape
from irq_convert.core.codebook import get_codebook
from irq_convert.core.parts import SUFFIXES, part_shapes
from irq_convert.errors import IrqError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix `[rows, cols]` as packed codes and per-block statistics.

    `codes` uint8 `[rows, row_bytes]`; `scale` and `tau` uint8 `[rows, blocks_per_row]` with a
    `*_grid` float32 `[groups, 2]` of (step, offset), or another of `STATISTIC_DTYPES`, of the same
    shape, with `*_grid` None. Every weight is `level[code] * scale + tau` (formats/irq-v1.md,
    section 4).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    tau: torch.Tensor
    scale_grid: torch.Tensor | None
    tau_grid: torch.Tensor | None
    cols: int
    codebook: str
    block_size: int

    @property
    def shape(self) -> BlockShape:
        bits = get_codebook(self.codebook).bits
        return BlockShape(self.codes.shape[0], self.cols, self.block_size, bits)

    def parts(self) -> dict[str, torch.Tensor]:
        """Stored tensors by the suffix that follows the tensor's name."""
        found = (self.codes, self.scale, self.tau, self.scale_grid, self.tau_grid)
        named = zip(SUFFIXES, found, strict=True)
        return {suffix: tensor for suffix, tensor in named if tensor is not None}

    def check(self, name: str = "tensor") -> None:
        """Raise `IrqError` when a part's shape contradicts `cols`, `block_size` or the codebook."""
        shape = self.shape
        wanted = part_shapes(shape, (shape.rows,))
        for suffix, tensor in self.parts().items():
            if tuple(tensor.shape) != wanted[suffix]:
                raise IrqError(
                    f"{name}{suffix} has shape {list(tensor.shape)}, but {self.codebook}, block "
                    f"size {self.block_size}, {self.cols} columns need {list(wanted[suffix])}"
                )
