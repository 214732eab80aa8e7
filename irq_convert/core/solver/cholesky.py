"""`A = L^T L` with L lower triangular, in the memory of A, from the last column to the first.

For columns in the order of a sweep this is the factor that the sweep reads, row by row, without
turning a matrix round; and a library's own factorization would hold two more matrices as large.

For the last panel of columns, `A = [[A0, B^T], [B, C]]`:  C = M^T M,  M^T X = B,  A0 -= X^T X.
"""

from __future__ import annotations

import torch

PANEL = 256
WIDE_PANEL = 4 * PANEL
"""Rows of what is left that are updated at a time: above the diagonal only within them."""


def factor_in_place(matrix: torch.Tensor) -> bool:
    """Overwrite `matrix` `[n, n]`, symmetric, float32 or float64, by L.

    False where it is not positive definite; its contents have no meaning then.
    """
    size = len(matrix)
    for stop in range(size, 0, -PANEL):
        start = max(0, stop - PANEL)
        corner, left = matrix[start:stop, start:stop], matrix[start:stop, :start]
        # Turned round, since below the diagonal alone all has been brought up to date.
        lower, failed = torch.linalg.cholesky_ex(corner.T.flip(0, 1))
        if bool(failed):
            return False
        own = lower.T.flip(0, 1)
        corner.copy_(own)
        matrix[start:stop, stop:] = 0
        if start:
            left.copy_(torch.linalg.solve_triangular(own.T, left, upper=True))
        for row in range(0, start, WIDE_PANEL):
            end = min(start, row + WIDE_PANEL)
            matrix[row:end, :end].addmm_(left[:, row:end].T, left[:, :end], alpha=-1)
    return True


def solve_factored(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`X` of `L^T L X = right`, `[n, m]`, for what `factor_in_place` made."""
    half = torch.linalg.solve_triangular(factor.T, right, upper=True)
    return torch.linalg.solve_triangular(factor, half, upper=False)
