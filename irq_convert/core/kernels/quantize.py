"""Quantize a tile on the CPU: sort, fit the second level, search, emit codes, group by group.

Groups run in parallel and nothing crosses a group, so neither threads nor the cutting into tiles
can change a byte. `irq_convert.core.portable.quantize` computes the same in torch.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from irq_convert.core.kernels.fixed import fixed_point
from irq_convert.core.kernels.group import INTEGER, fit_group, load_sorted, profile
from irq_convert.core.kernels.jit import entry_point, kernel
from irq_convert.core.kernels.score import bin_edges, table_sum
from irq_convert.core.kernels.search import make_scratch, search_block, stored_error
from irq_convert.core.kernels.sort import LANES
from irq_convert.core.kernels.zero import zero_profile

GROUP = 256


@kernel
def emit_codes(weights, tau, scale, mids, n_mids, bits, codes, packed):
    """Codes of `weights` in their own order, packed LSB first into `packed` from its first bit.

    `code = #{k : w >= tau + m_k * scale}`; a block starts on a byte because block sizes are
    multiples of eight.
    """
    n = weights.shape[0]
    for i in range(n):
        codes[i] = 0
    for k in range(n_mids):
        edge = tau + mids[k] * scale
        for i in range(n):
            codes[i] += np.uint8(weights[i] >= edge)
    for i in range(n, (n + 7) // 8 * 8):
        codes[i] = 0
    for start in range(0, n, 8):
        word = np.uint64(0)
        for i in range(8):
            word |= np.uint64(codes[start + i]) << np.uint64(i * bits)
        at = start // 8 * bits
        for byte in range(min(bits, packed.shape[0] - at)):
            packed[at + byte] = np.uint8((word >> np.uint64(8 * byte)) & np.uint64(255))


@kernel
def sort_group(weights, first, blocks, block_size, plan, tables, work):
    """Sort and profile one group; returns how many weights are NaN, infinite or too large."""
    cols = weights.shape[1]
    per_row = (cols + block_size - 1) // block_size
    bad = load_sorted(weights, first, blocks, per_row, block_size, work.lanes, tables.network)
    if bad > 0:
        return bad
    for b in range(blocks):
        start = (first + b) % per_row * block_size
        n = min(block_size, cols - start)
        profile(work.lanes[b // LANES], b % LANES, n, plan, work.profiles[b])
        if plan.path == INTEGER:
            zero_profile(plan, tables.levels, tables.n_levels, work.profiles[b])
        work.radii[b] = work.profiles[b, 6]
    return bad


@kernel
def search_group(
    weights, shares, owners, first, blocks, block_size, plan, tables, work, packed, tau_codes,
    scale_codes, counts, energies,
):  # fmt: skip
    """Search every block of a group and emit its codes, with the group's statistics."""
    cols = weights.shape[1]
    per_row = (cols + block_size - 1) // block_size
    n_mids = tables.n_levels - 1
    key = work.key
    for b in range(blocks):
        block = first + b
        row = block // per_row
        start = (block - row * per_row) * block_size
        n = min(block_size, cols - start)
        lanes, lane, seen = work.lanes[b // LANES], b % LANES, work.profiles[b]
        for i in range(n):
            key[i] = lanes[i * LANES + lane]
        source = weights[row, start : start + n]
        of_row = shares[owners[row]] if plan.weighted else shares[0]
        error, factor = search_block(
            key, n, source, of_row[start : start + n], seen, plan, tables, work
        )
        t, s = work.best[0], work.best[1]
        if plan.weighted:
            factor, squares = fixed_point(key, n, plan.plain_bits, work.prefix)
            error = stored_error(key, n, tables, work, t, s, factor, False) + squares
            work.squares[0] = squares
        tau_codes[block] = np.uint8(work.best_code[0])
        scale_codes[block] = np.uint8(work.best_code[1])
        bin_edges(key, n, n_mids, tables.mids, t, s, work.edges)
        counts[1] += table_sum(work.edges, tables.n_levels, tables.entropy)
        base = seen[2] if plan.uniform else np.float32(0.0)
        bin_edges(key, n, n_mids, tables.mids, base, seen[4], work.edges)
        counts[0] += table_sum(work.edges, tables.n_levels, tables.entropy)
        unit = 1.0 / (np.float64(factor) * np.float64(factor))
        energies[0] += np.float64(work.squares[0]) * unit
        energies[1] += np.float64(error) * unit
        emit_codes(
            source, t, s, tables.mids, n_mids, tables.bits, work.codes,
            packed[row, start * tables.bits // 8 :],
        )  # fmt: skip


def _make_quantize_tile(digest):
    def quantize_tile(
        weights, shares, owners, block_size, plan, tables, packed, tau_codes, scale_codes,
        tau_grids, scale_grids, counts, energies,
    ):  # fmt: skip
        """Quantize `weights`, float32 `[rows, cols]`, whose first block starts a group.

        `shares`, int32 `[matrices, cols]`, weigh the errors of columns where `plan.weighted`;
        `owners`, int32 `[rows]`, says which of the matrices a row belongs to.
        Fills `packed` uint8 `[rows, row_bytes]`, `tau_codes` and `scale_codes` uint8 `[blocks]`,
        `tau_grids` and `scale_grids` float32 `[groups, 2]`, `counts` int64 `[groups, 3]` (entropy
        table sums uncalibrated and stored, unusable weights) and `energies` float64 `[groups, 2]`
        (sum of squares of the weights and of the errors); both start at zero.
        """
        digest  # noqa: B018 - keys the cache
        total = tau_codes.shape[0]
        for group in prange((total + GROUP - 1) // GROUP):
            first = group * GROUP
            blocks = min(GROUP, total - first)
            work = make_scratch(block_size)
            bad = sort_group(weights, first, blocks, block_size, plan, tables, work)
            counts[group, 2] = bad
            if bad == 0:
                reach = np.sort(work.radii[:blocks])[blocks // 2]
                fit_group(work.profiles, blocks, reach, plan, work.tau_grid, work.scale_grid)
                tau_grids[group] = work.tau_grid[:2]
                scale_grids[group] = work.scale_grid[:2]
                search_group(
                    weights, shares, owners, first, blocks, block_size, plan, tables, work, packed,
                    tau_codes, scale_codes, counts[group], energies[group],
                )  # fmt: skip

    return quantize_tile


quantize_tile = entry_point(_make_quantize_tile)
