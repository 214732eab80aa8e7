"""What every choice damages at one weight: its error on some rows, weighed by what they count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.importance import column_shares
from irq_convert.core.quantize import quantize_with_stats
from irq_convert.core.spec import QuantSpec

ROWS = 128
"""Rows of a weight that are tried: for the error of a mean more are not needed."""


def damages(
    weight: torch.Tensor,
    inputs: np.ndarray,
    outputs: np.ndarray,
    specs: Sequence[QuantSpec],
    *,
    importance: np.ndarray | None,
    name: str,
    threads: int | None = None,
) -> np.ndarray:
    """Expected KL, nats a token, of quantizing `weight`, `[rows, cols]`, by each of `specs`.

    `inputs`: mean squares `[matrices, cols]` of matrices that lie one below the other; `outputs`:
    mean squares of gradients, `[rows]`. `importance`: what the search goes by, as `inputs`; None
    for all columns alike. Of many rows those in the middles of `ROWS` strata of `outputs` stand for
    all.
    """
    taken, counts = strata(outputs)
    chosen = weight[torch.from_numpy(taken)].float()
    columns = torch.from_numpy(_by_row(inputs, taken, len(weight)))
    own = importance
    if own is not None and len(own) > 1:
        own = _by_row(own, taken, len(weight))
    found = np.zeros(len(specs))
    for number, spec in enumerate(specs):
        shares = None
        if own is not None:
            shares = column_shares(own, len(chosen) // len(own), spec.block_size, name)
        quantized, _ = quantize_with_stats(chosen, spec, shares=shares, threads=threads, name=name)
        error = dequantize_tensor(quantized).cpu().double() - chosen.cpu().double()
        found[number] = 0.5 * float(counts @ (error.square() * columns).sum(1).numpy())
    return found


def _by_row(values: np.ndarray, taken: np.ndarray, rows: int) -> np.ndarray:
    """Of the matrix that each of the rows `taken` belongs to, its `values`."""
    found: np.ndarray = values[taken // (rows // len(values))]
    return found


def strata(outputs: np.ndarray, most: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Rows that stand for all, by falling weight, and the sum of `outputs` that each stands for."""
    order = np.argsort(-outputs, kind="stable")
    parts = np.array_split(order, min(most, len(order)))
    taken = np.array([part[len(part) // 2] for part in parts])
    return taken, np.array([outputs[part].sum() for part in parts])
