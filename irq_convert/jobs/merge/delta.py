"""What one adapted layer adds to its weight: `s B' A'`, by tiles of rows.

    A' = A + beta1 P        B' = B + beta2 E        s = alpha / r  or  alpha / sqrt(r)

(docs/method.md; formats/irq-adapter-v1.md, section 3). Folded and multiplied in float64: the
product costs little beside reading and writing a layer, and its roundings then never show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from irq_convert.artifact.adapter import LayerValues
from irq_convert.core.elastic import block_weights, fold_elastic, repeat_blocks


def fold_layer(
    values: LayerValues, cols: int, block_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`A'` `[rank, cols or blocks]` and `B'` `[out, rank]` in float64.

    `block_size` is that of a pooled adapter, None for one that sees the input itself.
    """
    columns = None if block_size is None else block_weights(cols, block_size)
    first, second = (torch.tensor(beta, dtype=torch.float64) for beta in values.beta)
    return fold_elastic(values.a, first, columns), fold_elastic(values.b, second)


@dataclass(frozen=True)
class Delta:
    """A folded layer: `a` `[rank, cols or blocks]` and `b` `[out, rank]`, float64, `b` scaled."""

    a: torch.Tensor
    b: torch.Tensor
    cols: int
    block_size: int | None

    @classmethod
    def fold(cls, values: LayerValues, scaling: float, cols: int, block_size: int | None) -> Delta:
        """The change that a layer with `cols` inputs gets."""
        a, b = fold_layer(values, cols, block_size)
        return cls(a, b * scaling, cols, block_size)

    @property
    def is_zero(self) -> bool:
        """Whether nothing is added: one of the two matrices is all zeros."""
        return not (bool(self.a.any()) and bool(self.b.any()))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start .. stop` of the change, float64 `[stop - start, cols]`."""
        product = self.b[start:stop] @ self.a
        if self.block_size is None:
            return product
        return repeat_blocks(product, self.cols, self.block_size)

    def block_rows(self, start: int, stop: int) -> torch.Tensor:
        """The change of every block's tau, float64 `[stop - start, blocks]`; pooled only."""
        assert self.block_size is not None
        return self.b[start:stop] @ self.a
