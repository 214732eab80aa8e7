"""`MatrixSolver`: codes, scale and tau of a matrix for the inputs that it sees.

1. Scale and tau by the exact search over storable pairs, squared errors weighed by the diagonal of
   H, from the original weights; they are frozen in their 8 bits.
2. The sweep: codes column by column against H, for the target W*.
3. Rounds of refitting scale and tau on their grids, and of coordinate descent over the codes.

What is stored is what was optimized: nothing is rounded afterwards. All of it happens on the device
of the weights, by the backend that the search takes there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from irq_convert.core.backends import resolve_backend
from irq_convert.core.blocks import GROUP_SIZE
from irq_convert.core.importance import Shares
from irq_convert.core.kernels.descend import descend_rows
from irq_convert.core.kernels.sweep import sweep_rows
from irq_convert.core.objective import ZeroPoint
from irq_convert.core.packing import pack_codes, unpack_codes
from irq_convert.core.portable.grid import Grid
from irq_convert.core.quantize import quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.core.solver import portable
from irq_convert.core.solver.moments import Factor, damped_in_place
from irq_convert.core.solver.options import SolverOptions
from irq_convert.core.spec import QuantSpec
from irq_convert.core.tensor_stats import TensorStats, entropy_sum
from irq_convert.core.threads import numba_threads


class MatrixSolver:
    """Quantizes a matrix in tiles of rows, each for the inputs that it sees.

    Rows of one matrix see the same inputs; the experts of a stack, one below the other, do not.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        spec: QuantSpec,
        shares: Shares | None = None,
        *,
        threads: int | None = None,
        name: str = "weight",
        backend: str = "auto",
    ) -> None:
        """Find scale and tau of `weight`, float32 `[rows, cols]`; `shares` weigh its columns.

        `backend` is that of `quantize_tensor`. Raises `IrqError` naming the tensor for weights
        that are not finite.
        """
        self._weight, self._spec, self._threads = weight, spec, threads
        self._backend = resolve_backend(backend, weight.device)
        self._found, self._stats = quantize_with_stats(
            weight, spec, shares=shares, backend=self._backend, threads=threads, name=name
        )
        found = self._found
        self._scale = expand_statistic(found.scale, found.scale_grid).contiguous()
        # A copy: integer zero points have their tau in float32, as it is.
        self._tau = expand_statistic(found.tau, found.tau_grid).clone()
        self._codes = unpack_codes(found.codes, spec.bits, found.cols)
        self._book = portable.Book(
            spec.block_size,
            torch.from_numpy(spec.book.level_array()).to(weight.device),
            torch.from_numpy(spec.book.midpoint_array()).to(weight.device),
        )
        self._grids, self._zeros = _grids(found), _zero_points(found, spec, self._book.levels)

    def solve(
        self,
        start: int,
        target: torch.Tensor,
        moments: torch.Tensor,
        factor: Factor,
        options: SolverOptions,
    ) -> None:
        """Solve the rows from `start` on for `target`, float32 `[rows, cols]`.

        `moments`: H, float32 `[cols, cols]`, symmetric; `factor` is what `factorize` made of it.
        """
        device = self._weight.device
        target, moments = target.to(device).contiguous(), moments.to(device)
        factor = replace(factor, order=factor.order.to(device), feedback=factor.feedback.to(device))
        rows = slice(start, start + len(target))
        solve = self._solve_numba if self._backend == "numba" else self._solve_device
        with damped_in_place(moments, factor.damping) as against:
            solve(rows, target, against, factor, options)

    def _solve_numba(
        self,
        rows: slice,
        target: torch.Tensor,
        against: torch.Tensor,
        factor: Factor,
        options: SolverOptions,
    ) -> None:
        scale, tau, codes = (p[rows].numpy() for p in (self._scale, self._tau, self._codes))
        levels, mids = self._book.levels.numpy(), self._book.mids.numpy()
        book = (self._spec.block_size, levels, mids, len(mids))
        wanted = target.numpy()
        with numba_threads(self._threads):
            if options.sweep:
                order, feedback = factor.order.numpy(), factor.feedback.numpy()
                sweep_rows(wanted, scale, tau, feedback, order, *book, codes)
            if options.rounds:
                descend_rows(
                    wanted, against.numpy(), (1.0 / against.diagonal()).numpy(), *book,
                    options.rounds, self._grids[rows].numpy(), self._zeros[rows].numpy(),
                    scale, tau, codes,
                )  # fmt: skip

    def _solve_device(
        self,
        rows: slice,
        target: torch.Tensor,
        against: torch.Tensor,
        factor: Factor,
        options: SolverOptions,
    ) -> None:
        scale, tau, codes = self._scale[rows], self._tau[rows], self._codes[rows]
        sweep, descend = _panels(self._backend)
        if options.sweep:
            portable.sweep_rows(target, scale, tau, factor, self._book, codes, sweep)
        if options.rounds:
            portable.descend_rows(
                target, against, self._book, options.rounds,
                self._grids[rows], self._zeros[rows], scale, tau, codes, descend,
            )  # fmt: skip

    def result(self) -> tuple[QuantizedTensor, TensorStats]:
        """What is stored, with its entropy and its error as a copy of the weights."""
        stored = _store(self._found, self._spec, self._scale, self._tau, self._codes)
        stats = _restate(self._stats, self._weight, self._codes, self._scale, self._tau, self._book)
        return stored, stats


def _panels(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What sweeps a panel of columns, and what descends in a block."""
    if backend == "triton":
        from irq_convert.core.triton.descend import descend_panel_triton
        from irq_convert.core.triton.sweep import sweep_panel_triton

        return sweep_panel_triton, descend_panel_triton
    return portable.sweep_panel, portable.descend_panel


def _grids(found: QuantizedTensor) -> torch.Tensor:
    """Step, offset and 1 / step of scale and of tau for each block, `[rows, blocks, 6]`."""
    assert found.scale_grid is not None
    columns = []
    for pairs in (found.scale_grid, found.scale_grid if found.tau_grid is None else found.tau_grid):
        grid = Grid.of_pairs(pairs).of_blocks(found.scale.numel())
        columns += [grid.step, grid.offset, grid.inverse]
    return torch.cat(columns, 1).view(*found.scale.shape, 6)


def _zero_points(found: QuantizedTensor, spec: QuantSpec, levels: torch.Tensor) -> torch.Tensor:
    """The code whose level ties tau to the scale, for each block; -1 where tau is free."""
    if spec.zero_point != ZeroPoint.INTEGER:
        return torch.full(found.scale.shape, -1, dtype=torch.int32, device=levels.device)
    scale = expand_statistic(found.scale, found.scale_grid)
    products = 0.0 - levels * scale[..., None]
    hit = products == found.tau[..., None]
    return hit.to(torch.uint8).argmax(-1).to(torch.int32)


def _store(
    found: QuantizedTensor,
    spec: QuantSpec,
    scale: torch.Tensor,
    tau: torch.Tensor,
    codes: torch.Tensor,
) -> QuantizedTensor:
    """`found` with other values on the same grids, which hold them exactly."""

    def encoded(values: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        grid = Grid.of_pairs(pairs).of_blocks(values.numel())
        return grid.encode(values.reshape(-1, 1)).to(torch.uint8).view(values.shape)

    assert found.scale_grid is not None
    return replace(
        found,
        codes=pack_codes(codes, spec.bits),
        scale=encoded(scale, found.scale_grid),
        tau=tau if found.tau_grid is None else encoded(tau, found.tau_grid),
    )


def _restate(
    stats: TensorStats,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    book: portable.Book,
) -> TensorStats:
    """`stats` of the search, with entropy and error of what is stored in its place."""
    shape = stats.shape
    padding = shape.blocks_per_row * shape.block_size - shape.cols
    outside = len(book.levels)
    blocks = torch.nn.functional.pad(codes, (0, padding), value=outside).view(shape.blocks, -1)
    dense = torch.nn.functional.pad(weight, (0, padding)).view(blocks.shape)
    pairs = scale.reshape(-1, 1), tau.reshape(-1, 1)
    error = torch.empty(shape.blocks, dtype=torch.float64, device=codes.device)
    step = GROUP_SIZE * 16
    for at in range(0, shape.blocks, step):
        part = slice(at, at + step)
        inside = blocks[part] < outside
        value = book.values(blocks[part].clamp_max(outside - 1), *(p[part] for p in pairs))
        wrong = torch.where(inside, value.double() - dense[part], 0.0)
        error[part] = (wrong * wrong).sum(1)
    energies = stats.energies.copy()
    starts = np.arange(0, shape.blocks, GROUP_SIZE)
    energies[:, 1] = np.add.reduceat(error.cpu().numpy(), starts)
    return TensorStats(shape, stats.plain, entropy_sum(codes.cpu().numpy(), shape), energies)
