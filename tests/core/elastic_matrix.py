"""The maps of IEC as matrices in full, to check against."""

from __future__ import annotations

import math

import torch


def elastic_matrix(rows: int, cols: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """`M(rows, cols)` in full, `[rows, cols]`."""
    groups = math.gcd(rows, cols)
    row = torch.arange(rows) // (rows // groups)
    col = torch.arange(cols) // (cols // groups)
    return (row[:, None] == col[None, :]).to(dtype) * (groups / cols)
