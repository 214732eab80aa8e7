"""`MatrixSolver` and `solve_matrix`: what is stored, what is said of it, what depends on what."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.importance import column_shares
from irq_convert.core.quantize import quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.core.solver import portable
from irq_convert.core.solver.moments import Factor, damped, factorize
from irq_convert.core.solver.options import SolverOptions
from irq_convert.core.solver.solve import MatrixSolver
from irq_convert.core.spec import BLOCK_SIZES, QuantSpec
from irq_convert.core.tensor_stats import TensorStats
from irq_convert.errors import IrqError

from ..test_quantize import same_bytes
from .make import Problem, codes_of, problem, solve_matrix

DAMPING = SolverOptions().damping
BACKENDS = pytest.mark.parametrize("backend", ["numba", "torch"])
SPECS = [
    QuantSpec("nf2", 64, "mse", 1),
    QuantSpec("nf3", 32, "entropy"),
    QuantSpec("int4", 16, "mse"),
    QuantSpec("int3", 32, "mse", 2, "integer"),
]
specs = st.builds(
    QuantSpec,
    codebook=st.sampled_from(sorted(CODEBOOKS)),
    block_size=st.sampled_from([16, 32, 64]),
    objective=st.sampled_from(["none", "entropy", "mse"]),
)
integers = st.builds(
    QuantSpec,
    codebook=st.sampled_from(["int2", "int3", "int4"]),
    block_size=st.sampled_from([16, 64]),
    objective=st.sampled_from(["entropy", "mse"]),
    zero_point=st.just("integer"),
)


def solved(
    p: Problem, spec: QuantSpec, options: SolverOptions | None = None, backend: str = "auto"
) -> tuple[QuantizedTensor, TensorStats]:
    return solve_matrix(p.weight, p.target, p.moments, spec, options, backend=backend)


def assert_near(p: Problem, spec: QuantSpec, options: SolverOptions | None = None) -> None:
    """Whole-tensor operations find what the CPU's kernels do, but for ties."""
    (ours, stats), (theirs, expected) = (solved(p, spec, options, b) for b in ("torch", "numba"))
    off = codes_of(ours, spec) != codes_of(theirs, spec)
    assert int(off.any(1).sum()) <= max(1, len(off) // 20)
    for a, b in ((ours.scale_grid, theirs.scale_grid), (ours.tau_grid, theirs.tau_grid)):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)
    loss, known = float(p.loss(ours).sum()), float(p.loss(theirs).sum())
    assert loss == pytest.approx(known, rel=1e-4 if not off.any() else 0.03)
    assert stats.plain == expected.plain
    if not off.any():
        assert stats.squared_error == pytest.approx(expected.squared_error, rel=1e-4)
        assert stats.stored == expected.stored


@settings(max_examples=20)
@given(st.one_of(specs, integers), st.integers(1, 30), st.integers(1, 140), st.integers(0, 99))
def test_portable_is_near_to_the_kernels(spec: QuantSpec, rows: int, cols: int, seed: int) -> None:
    assert_near(problem(rows, cols, seed), spec)


@pytest.mark.parametrize("spec", SPECS)
def test_portable_loses_nothing(spec: QuantSpec) -> None:
    p = problem(96, 200, 8)
    ours, theirs = (solved(p, spec, None, backend) for backend in ("torch", "numba"))
    share = (codes_of(ours[0], spec) != codes_of(theirs[0], spec)).float().mean()
    assert share < 2e-3
    assert float(p.loss(ours[0]).sum()) == pytest.approx(float(p.loss(theirs[0]).sum()), rel=1e-4)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_has_its_tails(block_size: int) -> None:
    cols = min(block_size + 9, 400) if block_size < 512 else block_size // 2 + 3
    p = problem(5, cols, block_size, 2 * cols)
    assert_near(p, QuantSpec("nf3", block_size, "mse"), SolverOptions(rounds=1))


@BACKENDS
@pytest.mark.parametrize("spec", SPECS)
def test_statistics_are_those_of_what_is_stored(spec: QuantSpec, backend: str) -> None:
    p = problem(30, 300, 2)
    q, stats = solved(p, spec, None, backend)
    q.check()
    error = (dequantize_tensor(q).double() - p.weight.double()).square().sum()
    assert stats.squared_error == pytest.approx(float(error), rel=1e-6)
    assert stats.energy == pytest.approx(float(p.weight.double().square().sum()), rel=1e-5)
    total, codes = 0.0, codes_of(q, spec).numpy()
    for row in codes:
        for start in range(0, 300, spec.block_size):
            counts = np.bincount(row[start : start + spec.block_size])
            share = counts[counts > 0] / counts.sum()
            total -= counts.sum() * float((share * np.log2(share)).sum())
    assert stats.entropy == pytest.approx(total / codes.size, abs=1e-5)


@BACKENDS
@pytest.mark.parametrize("spec", SPECS)
def test_every_round_lowers_the_loss_of_every_row(spec: QuantSpec, backend: str) -> None:
    p = problem(40, 150, 3)
    against = Problem(p.weight, p.target, damped(p.moments, DAMPING))
    losses = [
        against.loss(solved(p, spec, SolverOptions(rounds=n), backend)[0]) for n in (0, 1, 2, 5)
    ]
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert losses[-1].sum() < 0.97 * losses[0].sum()


@BACKENDS
@pytest.mark.parametrize("spec", SPECS)
def test_what_was_refitted_is_what_is_stored(spec: QuantSpec, backend: str) -> None:
    """Nothing is rounded when it is stored, and grids are those of the search."""
    p = problem(24, 150, 4)
    solver = MatrixSolver(p.weight, spec, backend=backend)
    first = solver.result()[0]
    assert same_bytes(first, quantize_with_stats(p.weight, spec)[0])
    options = SolverOptions(rounds=3)
    solver.solve(0, p.target, p.moments, factorize(p.moments, DAMPING, "weight"), options)
    q = solver.result()[0]
    assert q.scale_grid is not None
    assert torch.equal(q.scale_grid, first.scale_grid)
    assert torch.equal(expand_statistic(q.scale, q.scale_grid), solver._scale)
    assert torch.equal(expand_statistic(q.tau, q.tau_grid), solver._tau)
    assert not torch.equal(q.scale, first.scale), "nothing was refitted"


@BACKENDS
@pytest.mark.parametrize("codebook", ["int2", "int3", "int4"])
def test_zero_points_stay_integers(codebook: str, backend: str) -> None:
    spec, p = QuantSpec(codebook, 32, "mse", 0, "integer"), problem(20, 75, 5)
    q, _ = solved(p, spec, SolverOptions(rounds=3), backend)
    found, _ = quantize_with_stats(
        p.weight, spec, shares=column_shares(p.moments.diagonal().double().numpy(), 20, 32, "w")
    )
    levels = torch.from_numpy(spec.book.level_array())

    def zeros(each: QuantizedTensor) -> torch.Tensor:
        scale = expand_statistic(each.scale, each.scale_grid)
        hit = each.tau[..., None] == 0.0 - levels * scale[..., None]
        assert bool(hit.any(-1).all())
        return hit.to(torch.uint8).argmax(-1)

    assert q.tau.dtype == torch.float32
    assert q.tau_grid is None
    assert torch.equal(zeros(q), zeros(found))


@BACKENDS
def test_each_expert_is_solved_as_if_alone(backend: str) -> None:
    """128 rows of two blocks fill a group, so statistics are those of each expert alone."""
    spec, many = QuantSpec("nf3", 32, "mse"), 3
    alone = [problem(128, 50, seed) for seed in range(many)]
    weight = torch.cat([p.weight for p in alone])
    given = np.stack([p.moments.diagonal().double().numpy() for p in alone])
    solver = MatrixSolver(weight, spec, column_shares(given, 128, 32, "experts"), backend=backend)
    options = SolverOptions()
    for i in (2, 0, 1):
        p = alone[i]
        solver.solve(128 * i, p.target, p.moments, factorize(p.moments, DAMPING, "e"), options)
    whole, stats = solver.result()
    each = [solved(p, spec, options, backend) for p in alone]
    for suffix, tensor in whole.parts().items():
        assert torch.equal(tensor, torch.cat([q.parts()[suffix] for q, _ in each])), suffix
    total = each[0][1] + each[1][1] + each[2][1]
    assert (stats.plain, stats.stored) == (total.plain, total.stored)
    assert stats.energies.tobytes() == total.energies.tobytes()


@BACKENDS
def test_tiles_of_rows_change_nothing(backend: str) -> None:
    spec, p = QuantSpec("int4", 32), problem(50, 70, 6)
    factor = factorize(p.moments, DAMPING, "weight")
    results = []
    for cuts in ((0, 50), (0, 7, 23, 50)):
        solver = MatrixSolver(p.weight, spec, backend=backend)
        for start, stop in pairwise(cuts):
            solver.solve(start, p.target[start:stop], p.moments, factor, SolverOptions())
        results.append(solver.result()[0])
    if backend == "numba":
        assert same_bytes(*results)
    else:  # products of matrices may add in another order
        one, two = (codes_of(q, spec) for q in results)
        assert int((one != two).any(1).sum()) <= 2


def test_nothing_is_read_back_from_a_device() -> None:
    """Tensors without data cannot be, nor mixed with others."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    book = portable.Book(32, empty(8), empty(7))
    pair, codes = (empty(12, 3), empty(12, 3)), empty(12, 70, dtype=torch.uint8)
    factor = Factor(empty(70, dtype=torch.int64), empty(70, 70), 0.01)
    portable.sweep_rows(empty(12, 70), *pair, factor, book, codes)
    zeros = empty(12, 3, dtype=torch.int32)
    portable.descend_rows(
        empty(12, 70), empty(70, 70), book, 2, empty(12, 3, 6), zeros, *pair, codes
    )
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        portable.sweep_rows(torch.ones(12, 70), *pair, factor, book, codes)


def test_threads_change_no_byte() -> None:
    p = problem(70, 90, 7)
    one, two = (
        solve_matrix(p.weight, p.target, p.moments, QuantSpec("nf4"), threads=n) for n in (1, 2)
    )
    assert same_bytes(one[0], two[0])


@BACKENDS
def test_without_sweep_and_rounds_the_search_is_left(backend: str) -> None:
    spec, p = QuantSpec("nf3", 64, "mse"), problem(9, 130, 9)
    found, stats = solved(p, spec, SolverOptions(rounds=0, sweep=False), backend)
    shares = column_shares(p.moments.diagonal().double().numpy(), 9, 64, "weight")
    known, expected = quantize_with_stats(p.weight, spec, shares=shares)
    assert same_bytes(found, known)
    assert (stats.plain, stats.stored) == (expected.plain, expected.stored)
    assert stats.squared_error == pytest.approx(expected.squared_error, rel=1e-4)


@BACKENDS
@pytest.mark.parametrize("fill", [0.0, 0.5])
def test_constant_weights_and_unseen_columns(fill: float, backend: str) -> None:
    p = problem(4, 70, 10)
    p.weight[1], p.target[1] = fill, fill
    p.moments[:, 20:40], p.moments[20:40] = 0.0, 0.0
    q, stats = solved(p, QuantSpec("nf3", 32), None, backend)
    assert bool(torch.isfinite(dequantize_tensor(q)).all())
    assert bool((dequantize_tensor(q)[1] == fill).all())
    assert np.isfinite(stats.squared_error)


@BACKENDS
def test_what_is_not_finite_is_refused_by_name(backend: str) -> None:
    p = problem(4, 20, 11)
    options, spec = SolverOptions(), QuantSpec("nf3")
    for part in ("weight", "moments"):
        broken = {name: getattr(p, name).clone() for name in ("weight", "target", "moments")}
        broken[part][3, 3] = float("nan")
        with pytest.raises(IrqError, match=r"^layers\.7\.w[^\n]*$"):
            solve_matrix(
                broken["weight"], broken["target"], broken["moments"], spec, options,
                name="layers.7.w", backend=backend,
            )  # fmt: skip
