"""The sweep against GPTQ as its paper writes it, in float64 and with the inverse of H."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.scales import expand_statistic
from irq_convert.core.solver.moments import damped, factorize
from irq_convert.core.solver.options import SolverOptions
from irq_convert.core.solver.solve import MatrixSolver
from irq_convert.core.spec import QuantSpec

from .make import Problem, codes_of, problem

ALONE = SolverOptions(rounds=0)


def textbook(
    p: Problem, scale: np.ndarray, tau: np.ndarray, spec: QuantSpec, damping: float
) -> tuple[np.ndarray, np.ndarray]:
    """Codes by Algorithm 1 of Frantar et al. (2023), float64, columns by falling diagonal.

    Also how far, in scales, each value lay from the nearest boundary between two levels.
    """
    levels, mids = (a.astype(np.float64) for a in
                    (spec.book.level_array(), spec.book.midpoint_array()))  # fmt: skip
    h = p.moments.double().numpy()
    order = np.argsort(-np.diag(h), kind="stable")
    full = damped(p.moments, damping).double().numpy()[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(full)).T
    weight = p.target.double().numpy()[:, order]
    codes, near = np.zeros(weight.shape, int), np.zeros(weight.shape)
    for j in range(len(order)):
        s, t = (a[:, order[j] // spec.block_size].astype(np.float64) for a in (scale, tau))
        edges = t[:, None] + mids * s[:, None]
        codes[:, j] = (weight[:, j, None] >= edges).sum(1)
        near[:, j] = np.abs(weight[:, j, None] - edges).min(1) / s
        error = (weight[:, j] - (levels[codes[:, j]] * s + t)) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
    return codes, near


def assert_textbook(p: Problem, spec: QuantSpec, damping: float, backend: str) -> None:
    """Codes are those of the textbook until, in a row, a value lies on a boundary."""
    factor = factorize(p.moments, damping, "weight")
    solver = MatrixSolver(p.weight, spec, backend=backend)
    solver.solve(0, p.target, p.moments, factor, SolverOptions(damping=damping, rounds=0))
    q, _ = solver.result()
    scale = expand_statistic(q.scale, q.scale_grid).numpy()
    tau = expand_statistic(q.tau, q.tau_grid).numpy()
    wanted, near = textbook(p, scale, tau, spec, damping)
    found = codes_of(q, spec).numpy()[:, factor.order.numpy()]
    rows = np.nonzero((found != wanted).any(1))[0]
    assert len(rows) <= max(1, len(found) // 20)
    for row in rows:
        first = (found[row] != wanted[row]).argmax()
        assert near[row, first] < 1e-3


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("codebook", sorted(CODEBOOKS))
def test_every_codebook_sweeps_by_the_book(codebook: str, backend: str) -> None:
    assert_textbook(problem(37, 150, 1), QuantSpec(codebook, 32), 0.01, backend)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(
    ("cols", "block_size", "damping", "inputs"),
    [(1, 16, 0.01, 9), (16, 16, 0.3, 40), (70, 64, 0.05, 30), (129, 128, 0.01, 300)],
)
def test_tails_and_few_inputs(
    cols: int, block_size: int, damping: float, inputs: int, backend: str
) -> None:
    p = problem(19, cols, cols, inputs)
    assert_textbook(p, QuantSpec("int3", block_size, "mse", 0, "integer"), damping, backend)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_inputs_that_do_not_mix_leave_the_nearest_levels(backend: str) -> None:
    p = problem(20, 100, 5)
    flat = Problem(p.weight, p.weight, torch.diag(p.moments.diagonal()))
    spec = QuantSpec("nf3", 32)
    solver = MatrixSolver(p.weight, spec, backend=backend)
    solver.solve(0, p.weight, flat.moments, factorize(flat.moments, 0.01, "weight"), ALONE)
    assert torch.equal(solver.result()[0].codes, quantize_tensor(p.weight, spec).codes)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_the_sweep_lowers_the_loss(backend: str) -> None:
    p = problem(64, 200, 6)
    for codebook in ("nf2", "int3", "nf4"):
        spec = QuantSpec(codebook, 64, "mse")
        solver = MatrixSolver(p.weight, spec, backend=backend)
        before = p.loss(solver.result()[0]).sum()
        solver.solve(0, p.target, p.moments, factorize(p.moments, 0.01, "weight"), ALONE)
        assert p.loss(solver.result()[0]).sum() < 0.7 * before
