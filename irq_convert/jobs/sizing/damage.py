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
    for all columns alike. Of many rows some stand for all (`strata`).
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
    """At most so many rows that stand for all, and the sum of `outputs` that each stands for.

    Rows that weigh as much as a stratum stand for themselves, the others for strata of equal
    weight; of an embedding a few tokens have most of it.
    """
    order = np.argsort(-outputs, kind="stable")
    order = order[outputs[order] > 0]
    if not len(order):
        return np.zeros(1, np.int64), np.zeros(1)
    weights = outputs[order]
    left = weights[::-1].cumsum()[::-1]  # from each on
    budget = most - np.arange(len(order))
    light = np.flatnonzero((budget < 2) | (weights * budget < left))
    heavy = int(light[0]) if len(light) else len(order)
    taken, counts = [*order[:heavy]], [*weights[:heavy]]
    if heavy < len(order):
        rest, whole = weights[heavy:], left[heavy]
        middles = (rest.cumsum() - rest / 2) / whole
        numbers = np.minimum(middles * (most - heavy), most - heavy - 1).astype(np.int64)
        begins = np.flatnonzero(np.diff(numbers, prepend=-1))
        for part in np.split(np.arange(len(rest)), begins[1:]):
            taken.append(order[heavy + part[len(part) // 2]])
            counts.append(rest[part].sum())
    return np.array(taken), np.array(counts)
