"""The exact sweep against brute force in float64 and in rationals, and against the paper's grid."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.core.codebook import CODEBOOKS, Codebook
from irq_convert.core.ideal.oracle import breakpoint_search, grid_search, max_entropy, search_window
from irq_convert.core.ideal.search import icq_search
from irq_convert.core.search_plan import SHRINKS, entropy_table
from irq_convert.errors import IrqError, UsageError

from .blocks import kinds, make_blocks

pytestmark = pytest.mark.slow

BOOKS = pytest.mark.parametrize("book", CODEBOOKS.values(), ids=list(CODEBOOKS))
KINDS = pytest.mark.parametrize("kind", kinds())

# Shares of blocks whose best interval may be too narrow for float32: values on a grid whose
# crossings would coincide but for the rounding of midpoints, spreads of a few thousand ulps, and
# values so small beside tau that tau + m * s cannot tell them apart.
SHORT = {"gridded": 0.03, "offset": 0.03, ("mixed", "nf4"): 1.0}


@BOOKS
@KINDS
def test_sum_equals_brute_force_and_is_never_below_the_grid(kind: str, book: Codebook) -> None:
    many = 90 if kind == "tails" else 20  # tails of every length
    blocks, lengths = (part[:many] for part in make_blocks(kind, max(many, 30), seed=max(many, 30)))
    found = icq_search(blocks, book, lengths=lengths)
    exact = breakpoint_search(blocks, book, lengths=lengths)
    assert torch.equal(found.ideal_table_sum, exact.ideal_table_sum)
    short = found.table_sum != found.ideal_table_sum
    assert (found.table_sum >= found.ideal_table_sum).all()
    assert short.double().mean() <= SHORT.get((kind, book.name), SHORT.get(kind, 0.0))
    energy = (blocks.double() ** 2).where(torch.arange(64) < lengths[:, None], 0.0).sum(dim=1)
    difference = (found.ideal_squared_error - exact.ideal_squared_error).abs()
    assert (difference <= 1e-9 * energy).all()
    if kind not in SHORT and (kind, book.name) not in SHORT:
        same = found.table_sum == exact.table_sum
        assert (found.squared_error - exact.squared_error <= 1e-4 * energy)[same].all()
        assert same.double().mean() >= 0.99
    most = max_entropy(blocks, book, lengths)
    torch.testing.assert_close(found.entropy_bits[~short], most[~short], rtol=0, atol=1e-6)
    for n, some in ((100, many), (1000, many // 2)):
        wide, _, _ = grid_search(blocks[:some], book, n, lengths=lengths[:some])
        assert (found.ideal_table_sum[:some] <= wide).all(), f"below a grid of {2 * n + 1}"


@BOOKS
@pytest.mark.parametrize("kind", ["gaussian", "tails", "gridded"])
def test_squared_error_equals_brute_force(kind: str, book: Codebook) -> None:
    blocks, lengths = make_blocks(kind, 64, seed=5)
    blocks, lengths = blocks[-2:], lengths[-2:]
    found = icq_search(blocks, book, lengths=lengths, objective="mse")
    exact = breakpoint_search(blocks, book, lengths=lengths, objective="mse")
    torch.testing.assert_close(
        found.ideal_squared_error, exact.ideal_squared_error, rtol=1e-9, atol=1e-15
    )


def _float32_outcome(
    row: np.ndarray, book: Codebook, tau: np.float32, scale: np.float32
) -> tuple[int, float, float]:
    """Table sum, squared error and entropy of one block, straight from the format's formula."""
    edges = tau + book.midpoint_array() * scale
    codes = (row[:, None] >= edges).sum(axis=1)
    counts = np.bincount(codes, minlength=len(book.levels))
    values = book.level_array()[codes] * scale + tau
    p = counts[counts > 0] / len(row)
    error = ((row.astype(np.float64) - values.astype(np.float64)) ** 2).sum()
    return int(entropy_table(64)[counts].sum()), float(error), float(-(p * np.log2(p)).sum())


@BOOKS
@pytest.mark.parametrize("objective", ["entropy", "mse"])
@pytest.mark.parametrize("kind", ["tails", "gridded", "constant", "offset"])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_pair_gives_what_is_claimed(
    kind: str, book: Codebook, objective: str, backend: str
) -> None:
    blocks, lengths = make_blocks(kind, 70)
    if backend == "torch":
        blocks, lengths = blocks[8:12], lengths[8:12]
    found = icq_search(blocks, book, lengths=lengths, objective=objective, backend=backend)
    for i, (row, n) in enumerate(zip(blocks.numpy(), lengths.tolist(), strict=True)):
        tau, scale = found.tau[i].numpy()[()], found.scale[i].numpy()[()]
        total, error, bits = _float32_outcome(row[:n], book, tau, scale)
        assert total == found.table_sum[i]
        assert error == pytest.approx(float(found.squared_error[i]), rel=1e-9, abs=1e-30)
        assert bits == pytest.approx(float(found.entropy_bits[i]), abs=1e-6)


def _path(keys: list[Fraction], book: Codebook, objective: str, shrink: float):
    """Linear pieces `(tau0, tau1, s0, s1, first, last)` in t, and the unit of t; rationals."""
    radius, c = Fraction(search_window(book, objective)[0]), Fraction(shrink)
    lo, hi, center = keys[0], keys[-1], keys[(len(keys) - 1) // 2]
    middle, half = (lo + hi) / 2, (hi - lo) / 2
    if book.kind == "int" and objective == "entropy":
        return [(middle, middle, half, half, -radius, radius)], Fraction(1)
    if book.kind == "int":
        return [(middle, 1, c * half, 0, -radius * half, radius * half)], half
    unit = max(hi - center, center - lo)
    first, last, kink = -radius * unit, radius * unit, middle - center
    left = (center, 1, c * (hi - center), -c, first, min(last, kink))
    right = (center, 1, c * (center - lo), c, max(first, kink), last)
    return [left, right], unit


def _rational_optimum(
    values: list[float], book: Codebook, objective: str, shrinks: tuple[float, ...]
) -> tuple[list[int], list[Fraction]]:
    """Least table sum and least error over all intervals, and over those of some width."""
    keys = sorted(map(Fraction, values))
    mids = [Fraction(float(m)) for m in book.midpoint_array()]
    levels = [Fraction(float(x)) for x in book.level_array()]
    table = entropy_table(max(2, len(keys)))
    sums: list[list[int]] = [[], []]
    errors: list[list[Fraction]] = [[], []]
    for shrink in shrinks:
        pieces, unit = _path(keys, book, objective, shrink)
        for tau0, tau1, s0, s1, first, last in pieces:
            times = {first, last}
            for m in mids:
                if tau1 + m * s1:
                    times |= {(w - tau0 - m * s0) / (tau1 + m * s1) for w in keys}
            ordered = sorted(t for t in times if first <= t <= last)
            for low, high in pairwise(ordered):
                t = (low + high) / 2
                tau, s = tau0 + tau1 * t, s0 + s1 * t
                codes = [sum(w >= tau + m * s for m in mids) for w in keys]
                counts = np.bincount(codes, minlength=len(levels))
                rest = [w - tau0 - levels[k] * s0 for w, k in zip(keys, codes, strict=True)]
                slope = [tau1 + levels[k] * s1 for k in codes]
                flat = sum(g * g for g in slope)
                at = sum(r * g for r, g in zip(rest, slope, strict=True)) / flat if flat else low
                at = min(max(at, low), high)
                for i in range(1 + (high - low > unit * Fraction(2) ** -40)):
                    sums[i].append(int(table[counts].sum()))
                    errors[i].append(
                        sum((r - at * g) ** 2 for r, g in zip(rest, slope, strict=True))
                    )
    return [min(s) for s in sums], [min(e) for e in errors]


NASTY = st.one_of(
    st.lists(st.integers(-8, 8).map(lambda k: k / 8), min_size=2, max_size=9),
    st.lists(st.sampled_from([-1.0, -0.5, 0.0, 1 / 3, 0.5, 1.0]), min_size=2, max_size=9),
    st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=9),
    st.lists(st.floats(1.0, 1.0 + 2.0**-20, width=32), min_size=2, max_size=9),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=9),
).map(lambda values: [float(np.float32(x)) for x in values])


@settings(max_examples=80)
@given(values=NASTY, name=st.sampled_from(list(CODEBOOKS)))
def test_rational_arithmetic_agrees(values: list[float], name: str) -> None:
    if min(values) == max(values):
        return
    (least, least_wide), _ = _rational_optimum(values, CODEBOOKS[name], "entropy", (1.0,))
    found = icq_search(torch.tensor([values]), name)
    # An interval narrower than 2**-44 of the range does not count for the search.
    assert least <= found.ideal_table_sum <= least_wide
    exact = breakpoint_search(torch.tensor([values]), CODEBOOKS[name])
    assert exact.ideal_table_sum == found.ideal_table_sum


@settings(max_examples=25)
@given(values=NASTY, name=st.sampled_from(["nf2", "nf3", "int2", "int3"]))
def test_rational_squared_error_agrees(values: list[float], name: str) -> None:
    if min(values) == max(values):
        return
    _, (least, _) = _rational_optimum(values, CODEBOOKS[name], "mse", SHRINKS)
    found = icq_search(torch.tensor([values]), name, objective="mse")
    spread = (max(values) - min(values)) ** 2
    assert float(found.ideal_squared_error) == pytest.approx(float(least), abs=1e-9 * spread)


def _errors(blocks: torch.Tensor, book: Codebook, tau: torch.Tensor, s: torch.Tensor):
    """Squared error and table sum in float64 at pairs `[n, M]`."""
    codes = torch.zeros(*tau.shape, blocks.shape[1], dtype=torch.int64)
    for m in book.midpoint_array().astype(np.float64):
        codes += blocks[:, None] >= (tau + float(m) * s)[:, :, None]
    values = torch.tensor(book.levels, dtype=torch.float64)[codes] * s[..., None] + tau[..., None]
    counts = torch.nn.functional.one_hot(codes, len(book.levels)).sum(dim=2)
    table = torch.from_numpy(entropy_table(64)).long()
    return ((blocks[:, None] - values) ** 2).sum(dim=2), table[counts].sum(dim=2)


def _path_points(blocks: torch.Tensor, book: Codebook, objective: str, c: float, steps: int):
    radius, _ = search_window(book, objective)
    f = torch.linspace(-1, 1, steps, dtype=torch.float64) * radius
    lo, hi = blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)
    middle, half = (lo + hi) / 2, (hi - lo) / 2
    if book.kind == "int" and objective == "entropy":
        return (1 + f) * middle, (1 + f) * half
    if book.kind == "int":
        return middle + f * half, (c * half).expand(-1, steps)
    center = blocks.median(dim=1, keepdim=True).values
    tau = center + f * torch.maximum(hi - center, center - lo)
    return tau, c * torch.maximum(hi - tau, tau - lo)


@BOOKS
@pytest.mark.parametrize("kind", ["gaussian", "student", "gridded", "outlier"])
def test_squared_error_is_never_worse_than_a_fine_grid(kind: str, book: Codebook) -> None:
    blocks = make_blocks(kind, 10, seed=3)[0][:5]
    found = icq_search(blocks, book, objective="mse")
    wide = blocks.double()
    for c in SHRINKS:
        errors, _ = _errors(wide, book, *_path_points(wide, book, "mse", c, 401))
        least = errors.amin(dim=1)
        assert (found.ideal_squared_error <= least * (1 + 1e-9)).all()
        assert (found.squared_error <= least * (1 + 1e-3)).all()
    plain = icq_search(blocks, book)
    assert (found.squared_error <= plain.squared_error * (1 + 1e-3)).all() or book.kind == "int"


@BOOKS
@pytest.mark.parametrize("kind", ["gaussian", "repeated", "gridded"])
def test_equal_entropy_goes_to_the_lower_error(kind: str, book: Codebook) -> None:
    blocks = make_blocks(kind, 50, seed=4)[0][:16]
    found, wide = icq_search(blocks, book), blocks.double()
    errors, sums = _errors(wide, book, *_path_points(wide, book, "entropy", 1.0, 801))
    tied = errors.masked_fill(sums != found.ideal_table_sum[:, None], torch.inf).amin(dim=1)
    assert (found.ideal_squared_error <= tied * (1 + 1e-9)).all()
    assert (found.squared_error <= tied * (1 + 1e-2)).all()


def test_ties_in_both_go_to_the_pair_nearest_the_center() -> None:
    # Two weights are reproduced exactly wherever both ends are levels: only p = 1 does it.
    found = icq_search(torch.tensor([[-1.0, 3.0]]), "int2")
    assert (found.tau.item(), found.scale.item(), found.squared_error.item()) == (1.0, 2.0, 0.0)


@pytest.mark.parametrize("objective", ["entropy", "mse"])
@pytest.mark.parametrize("name", ["int2", "int3", "int4"])
def test_negation_keeps_the_optimum_of_symmetric_codebooks(name: str, objective: str) -> None:
    blocks, lengths = make_blocks("tails", 200)
    plain = icq_search(blocks, name, lengths=lengths, objective=objective)
    mirrored = icq_search(-blocks, name, lengths=lengths, objective=objective)
    if objective == "entropy":
        assert torch.equal(plain.ideal_table_sum, mirrored.ideal_table_sum)
    torch.testing.assert_close(plain.ideal_squared_error, mirrored.ideal_squared_error)


@BOOKS
@pytest.mark.parametrize("objective", ["entropy", "mse"])
@pytest.mark.parametrize("exponent", [-80, -3, 1, 60])
def test_powers_of_two_scale_the_pair(book: Codebook, objective: str, exponent: int) -> None:
    blocks, lengths = make_blocks("tails", 100)
    plain = icq_search(blocks, book, lengths=lengths, objective=objective)
    scaled = icq_search(blocks * 2.0**exponent, book, lengths=lengths, objective=objective)
    assert torch.equal(plain.tau * 2.0**exponent, scaled.tau)
    assert torch.equal(plain.scale * 2.0**exponent, scaled.scale)
    assert torch.equal(plain.table_sum, scaled.table_sum)


@BOOKS
def test_order_padding_and_threads_do_not_matter(book: Codebook) -> None:
    blocks, lengths = make_blocks("tails", 300)
    plain = icq_search(blocks, book, lengths=lengths)
    padding = torch.arange(64) >= lengths[:, None]
    spoiled = icq_search(blocks.masked_fill(padding, torch.nan), book, lengths=lengths)
    reversed_rows = icq_search(blocks.flip(0), book, lengths=lengths.flip(0))
    whole, _ = make_blocks("gaussian", 50)
    shuffled = icq_search(whole[:, torch.randperm(64)], book)
    assert torch.equal(plain.tau, spoiled.tau)
    assert torch.equal(plain.scale, reversed_rows.scale.flip(0))
    assert torch.equal(icq_search(whole, book).tau, shuffled.tau)


@BOOKS
@pytest.mark.parametrize("objective", ["entropy", "mse"])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_blocks_without_range_are_exact(book: Codebook, objective: str, backend: str) -> None:
    blocks = torch.tensor([[0.0] * 5, [-0.0] * 5, [0.1] * 5, [-3e38 * 2.0**-10] * 5, [1e-45] * 5])
    found = icq_search(blocks, book, objective=objective, backend=backend)
    assert torch.equal(found.tau, blocks[:, 0])
    for zero in (found.scale, found.entropy_bits, found.squared_error, found.ideal_squared_error):
        assert torch.equal(zero, torch.zeros_like(zero))
    single = icq_search(blocks[:, :1], book, objective=objective, backend=backend)
    assert torch.equal(single.tau, blocks[:, 0])


@BOOKS
def test_smallest_magnitudes_stay_finite(book: Codebook) -> None:
    blocks = torch.arange(12, dtype=torch.float32)[None] * 2.0**-149
    found = icq_search(blocks, book)
    assert found.tau.isfinite().all()
    assert (found.scale > 0).all()
    assert found.ideal_table_sum <= found.table_sum
    assert found.ideal_table_sum == breakpoint_search(blocks, book).ideal_table_sum


def test_no_blocks_give_no_results() -> None:
    for backend in ("numba", "torch"):
        assert icq_search(torch.empty(0, 64), "nf4", backend=backend).tau.shape == (0,)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 2.0**120])
def test_unusable_weights_are_refused(bad: float) -> None:
    with pytest.raises(IrqError, match=r"NaN|magnitudes"):
        icq_search(torch.tensor([[0.0, bad]]), "nf4")


def test_wrong_use_is_refused() -> None:
    blocks = torch.zeros(2, 4)
    with pytest.raises(UsageError, match="objective"):
        icq_search(blocks, "nf4", objective="none")
    with pytest.raises(UsageError, match="backend"):
        icq_search(blocks, "nf4", backend="cuda")
    with pytest.raises(UsageError, match="float32"):
        icq_search(blocks.double(), "nf4")
    with pytest.raises(UsageError, match="codebook"):
        icq_search(blocks, "nf5")
    for lengths in (torch.tensor([1]), torch.tensor([0, 4]), torch.tensor([5, 4])):
        with pytest.raises(UsageError, match="lengths"):
            icq_search(blocks, "nf4", lengths=lengths)
