"""How exact the ICQ sweep is: against brute force over all crossings and the paper's grids.

    python -m tests.bench.exactness [--blocks 100000] [--threads 2]

For every kind of block and every codebook it prints the share of blocks whose optimum equals the
brute force's, the share below grids of 201 and 2001 candidates (float64 arithmetic for all), by
how many bits of entropy the sweep differs or falls short at most, and how many blocks have no
float32 pair that reaches the optimum. Brute force and grids are compiled here, from their
definitions, and checked against `irq_convert.core.ideal.oracle` on a sample in the same run. Exits
with 1 if any claim fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import torch
from numba import njit, prange

sys.path.insert(0, str(Path(__file__).parents[2]))

from irq_convert.core.codebook import CODEBOOKS, Codebook
from irq_convert.core.ideal.oracle import RESOLUTION, breakpoint_search, grid_search, search_window
from irq_convert.core.ideal.search import icq_search
from irq_convert.core.search_plan import INT_RADIUS, NF_RADIUS, entropy_shift, entropy_table
from tests.core.blocks import kinds, make_blocks
from tests.paths import ABSENT

KINDS = ("gaussian", "student", "real", "repeated", "tails", "constant", "outlier")
EXTRA = ("gridded", "offset", "mixed")
SIZE = 64
GRIDS = (100, 1000)


@njit(cache=True)
def _wide(x):
    return np.float64(x)


@njit(cache=True)
def _narrow(x):
    return np.float32(x)


@njit(cache=True)
def _direct_sum(weights, n, mids, table, tau, scale, counts):
    """Table sum of the codes at one pair, every weight compared with every boundary."""
    counts[:] = 0
    for k in range(mids.shape[0]):
        edge = tau + mids[k] * scale
        below = 0
        for i in range(n):
            below += weights[i] < edge
        counts[k] += below
        counts[k + 1] -= below
    counts[mids.shape[0]] += n
    total = 0
    for k in range(mids.shape[0] + 1):
        total += table[counts[k]]
    return total


@njit(cache=True)
def _crossings(weights, n, mids, tau1, s0, s1, first, last, times, used):
    for k in range(mids.shape[0]):
        rate = tau1 + mids[k] * s1
        for i in range(n):
            t = (weights[i] - mids[k] * s0) / rate if rate != 0.0 else first
            if first < t < last:
                times[used] = t
                used += 1
    return used


@njit(parallel=True, cache=True)
def _brute_force(blocks, lengths, mids, table, uniform, radius, sums):
    """The least table sum over the middles of all intervals between crossings."""
    size = blocks.shape[1]
    for b in prange(blocks.shape[0]):
        n = lengths[b]
        weights = np.sort(blocks[b, :n].astype(np.float64))
        lo, hi = weights[0], weights[n - 1]
        sums[b] = table[n]
        if lo == hi:
            continue
        center = (lo + hi) / 2 if uniform else weights[(n - 1) // 2]
        weights -= center
        lo, hi = weights[0], weights[n - 1]
        unit = 1.0 if uniform else max(hi, -lo)
        reach, kink = radius * unit, (lo + hi) / 2
        times = np.empty(2 * size * mids.shape[0] + 3)
        times[0], times[1], used = -reach, reach, 2
        if uniform:
            used = _crossings(weights, n, mids, center, hi, hi, -reach, reach, times, used)
        else:
            if abs(kink) < reach:
                times[2], used = kink, 3
            left, right = min(reach, kink), max(-reach, kink)
            used = _crossings(weights, n, mids, 1.0, hi, -1.0, -reach, left, times, used)
            used = _crossings(weights, n, mids, 1.0, -lo, 1.0, right, reach, times, used)
        times = np.sort(times[:used])
        counts = np.empty(mids.shape[0] + 1, np.int64)
        best = np.int64(1) << 62
        for j in range(used - 1):
            if times[j + 1] - times[j] > RESOLUTION * unit:
                t = (times[j] + times[j + 1]) / 2
                tau = center * t if uniform else t
                scale = hi + hi * t if uniform else max(hi - t, t - lo)
                best = min(best, _direct_sum(weights, n, mids, table, tau, scale, counts))
        sums[b] = best


@njit(parallel=True, cache=True)
def _grid(blocks, lengths, mids, table, uniform, steps, cast, sums):
    """The least table sum over the paper's candidates, in the arithmetic of `cast`.

    How many weights lie below a boundary is counted from where the last candidate's count stood.
    """
    for b in prange(blocks.shape[0]):
        n = lengths[b]
        weights = np.sort(blocks[b, :n])
        lo, hi = np.float64(weights[0]), np.float64(weights[n - 1])
        center = (lo + hi) / 2 if uniform else np.float64(weights[(n - 1) // 2])
        reach = max(hi - center, center - lo)
        edges = np.zeros(mids.shape[0] + 2, np.int64)
        edges[-1] = n
        best = np.int64(1) << 62
        for step in steps:
            if uniform:
                tau, scale = cast((1 + step) * center), cast((1 + step) * (hi - center))
            else:
                tau = cast(center + step * reach)
                scale = max(cast(cast(hi) - tau), cast(tau - cast(lo)))
            total = 0
            for k in range(mids.shape[0]):
                edge = cast(tau + cast(mids[k] * scale))
                below = edges[k + 1]
                while below < n and weights[below] < edge:
                    below += 1
                while below > 0 and not weights[below - 1] < edge:
                    below -= 1
                edges[k + 1] = below
                total += table[below - edges[k]]
            best = min(best, total + table[n - edges[mids.shape[0]]])
        sums[b] = best


@dataclass(frozen=True)
class Row:
    """One line of the table: numbers of blocks, but for the two differences in bits."""

    kind: str
    codebook: str
    blocks: int
    unequal: int
    difference: float
    below: tuple[int, int]
    gain: float  # mean bits by which the optimum exceeds the smaller grid
    short: int
    shortfall: float
    lucky: int  # float32 grid of 201 above the float32 pair
    seconds: float

    @property
    def holds(self) -> bool:
        return not self.unequal and not any(self.below)


def _grid_sums(
    blocks: np.ndarray, lengths: np.ndarray, book: Codebook, n: int, narrow: bool = False
) -> np.ndarray:
    sums = np.empty(len(blocks), np.int64)
    radius = INT_RADIUS if book.kind == "int" else NF_RADIUS
    steps = radius * torch.linspace(-1, 1, 2 * n + 1, dtype=torch.float64).numpy()
    mids = book.midpoint_array().astype(np.float32 if narrow else np.float64)
    cast = _narrow if narrow else _wide
    table = entropy_table(SIZE).astype(np.int64)
    _grid(blocks, lengths, mids, table, book.kind == "int", steps, cast, sums)
    return sums


def _brute_sums(blocks: np.ndarray, lengths: np.ndarray, book: Codebook) -> np.ndarray:
    sums = np.empty(len(blocks), np.int64)
    radius, _ = search_window(book, "entropy")
    mids, table = book.midpoint_array().astype(np.float64), entropy_table(SIZE).astype(np.int64)
    _brute_force(blocks, lengths, mids, table, book.kind == "int", radius, sums)
    return sums


def _validate(kind: str, book: Codebook, sample: int) -> None:
    """The compiled references of this file against the plain torch ones, on a sample."""
    blocks, lengths = make_blocks(kind, sample, SIZE, seed=7)
    raw, many = blocks.numpy(), lengths.numpy()
    exact = breakpoint_search(blocks, book, lengths=lengths)
    ours = _brute_sums(raw, many, book)
    if not np.array_equal(ours, exact.ideal_table_sum.numpy()):
        raise SystemExit(f"brute force of the benchmark disagrees with the oracle: {kind} {book}")
    for narrow, dtype in ((False, torch.float64), (True, torch.float32)):
        grid, _, _ = grid_search(blocks, book, 100, lengths=lengths, dtype=dtype)
        if not np.array_equal(_grid_sums(raw, many, book, 100, narrow), grid.numpy()):
            raise SystemExit(f"grid of the benchmark disagrees with the oracle: {kind} {book}")


def measure(kind: str, book: Codebook, many: int, sample: int) -> Row:
    """Compare the sweep with brute force and grids on `many` blocks of a kind."""
    began = time.perf_counter()
    _validate(kind, book, sample)
    blocks, lengths = make_blocks(kind, many, SIZE, seed=1)
    raw, n = blocks.numpy(), lengths.numpy()
    found = icq_search(blocks, book, lengths=lengths)
    ideal, reached = found.ideal_table_sum.numpy(), found.table_sum.numpy()
    bits = 2.0 ** -entropy_shift(SIZE) / n
    brute = _brute_sums(raw, n, book)
    grids = [_grid_sums(raw, n, book, steps) for steps in GRIDS]
    narrow = _grid_sums(raw, n, book, GRIDS[0], narrow=True)
    return Row(
        kind=kind,
        codebook=book.name,
        blocks=len(raw),
        unequal=int((ideal != brute).sum()),
        difference=float((np.abs(ideal - brute) * bits).max()),
        below=(int((ideal > grids[0]).sum()), int((ideal > grids[1]).sum())),
        gain=float(((grids[0] - ideal) * bits).mean()),
        short=int((reached != ideal).sum()),
        shortfall=float(((reached - ideal) * bits).max()),
        lucky=int((narrow < reached).sum()),
        seconds=time.perf_counter() - began,
    )


HEADER = (
    f"{'blocks':9} {'codebook':8} {'number':>7}  {'= brute':>9}  {'max diff':>8}  "
    f"{'< grid201':>9}  {'< grid2001':>10}  {'gain bits':>9}  {'f32 short':>9}  {'by bits':>8}  "
    f"{'< f32 grid':>10}  {'s':>5}"
)


def _line(row: Row) -> str:
    equal = 100 * (1 - row.unequal / row.blocks)
    below = [100 * x / row.blocks for x in row.below]
    return (
        f"{row.kind:9} {row.codebook:8} {row.blocks:7}  {equal:8.4f}%  {row.difference:8.1e}  "
        f"{below[0]:8.4f}%  {below[1]:9.4f}%  {row.gain:9.5f}  {row.short:9}  "
        f"{row.shortfall:8.1e}  {row.lucky:10}  {row.seconds:5.1f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=100_000, help="blocks of each kind")
    parser.add_argument("--sample", type=int, default=100, help="blocks checked against torch")
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--extra", action="store_true", help=f"also {', '.join(EXTRA)}")
    options = parser.parse_args()
    numba.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    began, rows = time.perf_counter(), []
    print(HEADER)
    for kind in (*KINDS, *(EXTRA if options.extra else ())):
        if kind not in kinds():
            print(f"{kind:9} skipped: {ABSENT}")
            continue
        for book in CODEBOOKS.values():
            rows.append(measure(kind, book, options.blocks, options.sample))
            print(_line(rows[-1]), flush=True)
    total = sum(row.blocks for row in rows)
    short = sum(row.short for row in rows)
    print(
        f"{total} searches in {time.perf_counter() - began:.0f} s on {options.threads} threads. "
        f"Sweep unequal to brute force: {sum(row.unequal for row in rows)}; below a grid: "
        f"{sum(sum(row.below) for row in rows)}; optimum without a float32 pair: {short}."
    )
    print(
        "max diff: bits between sweep and brute force. gain: mean bits above grid201. f32 short: "
        "blocks whose best interval no float32 pair hits, and the most bits that costs. < f32 "
        "grid: blocks where a grid in float32 beats the pair, by rounding or where f32 is short."
    )
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
