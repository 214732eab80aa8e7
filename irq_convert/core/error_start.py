"""The low-rank matrix nearest to what quantizing has lost, as the inputs of a layer see it.

`Delta = W - W^` is the error of a layer, H the second moments of its inputs. Of all D of rank r

    D = U U^T Delta     minimizes     tr (Delta - D) H (Delta - D)^T = || (Delta - D) R ||^2,

where `R R^T = H` and U are the r leading left singular vectors of `Delta R` (Eckart and Young), so
that R is never inverted. A pooled adapter is given sums over blocks of inputs, `u = S x`: the best
E for `(Delta - E S) R` is the least-squares one, `N K^-1` with `N = Delta H S^T`, `K = S H S^T`,
and of rank r the matrix nearest to it in the norm of K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from irq_convert.core.elastic import block_sums, repeat_blocks
from irq_convert.errors import IrqError

DAMPING = 0.01
"""On the diagonal of H, in its mean: inputs that the text hardly shows count a little."""
SMALLEST = 1e-6
"""Directions of less than this part of the largest singular value are rounding."""


@dataclass(frozen=True)
class LowRank:
    """`b` `[rows, k]` times `a` `[k, inputs]`, float32, k at most the rank that was asked for.

    `before` and `left`: the error `tr Delta H Delta^T`, H damped, without it and with it.
    """

    a: torch.Tensor
    b: torch.Tensor
    before: float
    left: float

    def product(self, block_size: int | None = None, cols: int = 0) -> torch.Tensor:
        """`b a`, `[rows, inputs]`; of a pooled product on the `cols` inputs themselves."""
        found = self.b @ self.a
        return found if block_size is None else repeat_blocks(found, cols, block_size)


def nearest_low_rank(
    delta: torch.Tensor,
    moments: torch.Tensor,
    rank: int,
    *,
    block_size: int | None = None,
    damping: float = DAMPING,
    name: str = "the weight",
) -> LowRank:
    """The product of rank at most `rank` that takes most of `delta` away, on `delta`'s device.

    `delta` floating `[rows, cols]`; `moments` H, floating: `[cols, cols]`, or its diagonal
    `[cols]` (ones for no H). With `block_size` the product acts on sums over blocks of so many
    inputs, the last of which may be short. Singular values of `Delta R` are split evenly over both
    factors, H having a mean diagonal of 1; an H that is 0 counts as none. Directions in which there
    is nothing to take away are left out. The same bytes for the same arguments and threads.

    Raises `IrqError` naming the tensor `name` for numbers that are NaN or infinite.
    """
    if not bool(torch.isfinite(delta).all()):
        raise IrqError(f"{name}: its weights, or those of the source, are NaN or infinite")
    if not bool(torch.isfinite(moments).all()):
        raise IrqError(f"{name}: the second moments of its inputs are NaN or infinite")
    delta, mean = delta.double(), float(_diagonal(moments).double().mean())
    if mean > 0:
        h = moments.to(delta.device, torch.float64) / mean
        _diagonal(h).add_(damping)
    else:
        h, mean = delta.new_ones(delta.shape[1]), 1.0
    target, metric = delta, h
    if block_size is not None:
        metric = _pooled_metric(h, block_size)
        target = _solve(metric, block_sums(_times(delta, h), block_size))
    b, a = (each.float() for each in _factors(target, metric, min(rank, *target.shape)))
    before, left = _errors(delta, h, a.double(), b.double(), block_size)
    return LowRank(a, b, mean * before, mean * left)


def _diagonal(h: torch.Tensor) -> torch.Tensor:
    return h if h.dim() == 1 else h.diagonal()


def _times(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """`x h`, `[rows, cols]`."""
    return x * h if h.dim() == 1 else x @ h


def _pooled_metric(h: torch.Tensor, block_size: int) -> torch.Tensor:
    """`S H S^T`: `[blocks, blocks]`, or its diagonal where h is one."""
    sums = block_sums(h, block_size)
    return sums if h.dim() == 1 else block_sums(sums.T.contiguous(), block_size)


def _root(h: torch.Tensor) -> torch.Tensor:
    """R with `R R^T = h`: lower triangular, or a diagonal where h is one."""
    if h.dim() == 1:
        return h.sqrt()
    lower, failed = torch.linalg.cholesky_ex(h)
    more = 1e-12
    while bool(failed):  # without damping H may lack rank
        raised = h.clone()
        raised.diagonal().add_(more)
        lower, failed = torch.linalg.cholesky_ex(raised)
        more *= 4
    return lower


def _solve(h: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`right h^-1`, `[rows, n]`."""
    return right / h if h.dim() == 1 else torch.cholesky_solve(right.T, _root(h)).T


def _factors(
    target: torch.Tensor, metric: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """B `[rows, k]` and A `[k, n]`: of the smaller Gram matrix the leading eigenvectors."""
    rows, n = target.shape
    if rows <= n:
        values, left = _leading(_times(target, metric) @ target.T, rank)
    else:
        root = _root(metric)
        gram = target.T @ target
        gram = root[:, None] * gram * root if root.dim() == 1 else root.T @ gram @ root
        values, right = _leading(gram, rank)
        image = root[:, None] * right if root.dim() == 1 else root @ right
        left = target @ image / values
    halves = values.sqrt()
    return left * halves, (left.T @ target) / halves[:, None]


def _leading(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Square roots of the `rank` largest eigenvalues, falling, and their vectors, `[n, k]`.

    The largest entry of each vector is made positive, the first of equal ones, so that signs do
    not depend on the library's.
    """
    if not gram.numel() or not bool((gram != 0).any()):
        return gram.new_ones(0), gram.new_zeros(len(gram), 0)
    squares, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    values = squares.flip(0)[:rank].clamp(min=0).sqrt()
    kept = int((values > SMALLEST * values[0]).sum())
    vectors = vectors.flip(1)[:, :kept]
    top = vectors.abs().argmax(0)
    signs = vectors.gather(0, top[None]).sign()
    return values[:kept], vectors * signs


def _errors(
    delta: torch.Tensor, h: torch.Tensor, a: torch.Tensor, b: torch.Tensor, block_size: int | None
) -> tuple[float, float]:
    """`tr E H E^T` for E = `delta`, and less the product."""
    before = float((_times(delta, h) * delta).sum())
    if block_size is not None:
        a = repeat_blocks(a, delta.shape[1], block_size)
    rest = delta - b @ a
    return before, float((_times(rest, h) * rest).sum())
