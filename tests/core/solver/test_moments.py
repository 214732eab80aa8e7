"""Damping, the factor of H and the corrected weights, against float64 algebra."""

from __future__ import annotations

import pytest
import torch

from irq_convert.core.solver import cholesky
from irq_convert.core.solver import moments as module
from irq_convert.core.solver.moments import corrections, damped, factorize, pulled
from irq_convert.errors import IrqError
from tests.fresh import Forks

from .make import problem


def rebuilt(factor: module.Factor, moments: torch.Tensor) -> torch.Tensor:
    """`V D V^T` in the order of the sweep, float64, with D from what is left of H."""
    upper = factor.feedback.double().T
    half = torch.linalg.solve(upper, moments)
    diagonal = torch.linalg.solve(upper, half.T).diagonal()
    return upper * diagonal @ upper.T


@pytest.mark.parametrize("wide", [8192, 1])
@pytest.mark.parametrize("panel", [256, 16])
@pytest.mark.parametrize(("cols", "inputs"), [(1, 5), (40, 200), (90, 30)])
def test_the_factor_rebuilds_h(
    cols: int, inputs: int, panel: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WIDE", wide)
    monkeypatch.setattr(cholesky, "PANEL", panel)
    monkeypatch.setattr(cholesky, "WIDE_PANEL", 2 * panel)
    moments = problem(2, cols, cols, inputs).moments
    factor = factorize(moments, 0.01, "layer")
    assert factor.damping == 0.01
    assert factor.order.sort().values.tolist() == list(range(cols))
    along = moments.diagonal()[factor.order]
    assert bool((along[1:] <= along[:-1]).all())
    feedback = factor.feedback
    assert feedback.dtype == torch.float32
    assert bool((feedback.diagonal() == 1).all())
    assert not feedback.triu(1).any()
    wanted = damped(moments, 0.01)[factor.order][:, factor.order].double()
    torch.testing.assert_close(
        rebuilt(factor, wanted), wanted, rtol=1e-4, atol=1e-4 * float(wanted.diagonal().mean())
    )


def test_ties_of_the_diagonal_go_by_index() -> None:
    assert factorize(torch.eye(7), 0.01, "layer").order.tolist() == list(range(7))


def test_damping_is_doubled_until_there_is_a_factor() -> None:
    moments = torch.ones(6, 6) - 1.02 * torch.eye(6)
    moments.diagonal().fill_(0.5)
    factor = factorize(moments, 0.01, "layer")
    assert factor.damping > 0.5
    assert float(torch.tensor(factor.damping / 0.01).log2() % 1) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    moments = torch.eye(5)
    moments[1, 2] = bad
    with pytest.raises(IrqError, match=r"^layers\.3: the second moments [^\n]* infinite$"):
        factorize(moments, 0.01, "layers.3")


def test_damping_is_in_mean_diagonals() -> None:
    moments = torch.diag(torch.tensor([1.0, 2.0, 6.0]))
    before = moments.clone()
    found = damped(moments, 0.5)
    assert torch.equal(moments, before)
    assert torch.equal(found, torch.diag(torch.tensor([2.5, 3.5, 7.5])))


def test_columns_without_inputs_count_as_the_mean() -> None:
    moments = torch.diag(torch.tensor([4.0, 0.0, 2.0]))
    assert damped(moments, 0.5).diagonal().tolist() == [5.0, 2.0, 3.0]
    assert damped(torch.zeros(3, 3), 0.5).diagonal().tolist() == [1.0, 1.0, 1.0]
    assert factorize(torch.zeros(3, 3), 0.01, "layer").feedback.tolist() == torch.eye(3).tolist()


def corrected(
    weight: torch.Tensor, h: torch.Tensor, cross: torch.Tensor, part: float, ridge: float
) -> torch.Tensor:
    return corrections([weight], [pulled(weight, cross)], h, part, ridge)[0]


@pytest.mark.parametrize("wide", [8192, 1])
@pytest.mark.parametrize("panel", [256, 8])
def test_corrected_is_the_formula(panel: int, wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDE", wide)
    monkeypatch.setattr(cholesky, "PANEL", panel)
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(9, 30, generator=rng)
    source = torch.randn(200, 30, generator=rng)
    seen = source + 0.1 * torch.randn(200, 30, generator=rng)
    h, cross = seen.T @ seen, (source - seen).T @ source
    h = (h + h.T) / 2
    ridge = 0.05 * h.diagonal().double().mean() * torch.eye(30, dtype=torch.float64)
    change = weight.double() @ cross.double() @ torch.linalg.inv(h.double() + ridge)
    for alpha in (0.0, 0.5, 1.0):
        found = corrected(weight, h, cross, alpha, 0.05)
        assert found.dtype == torch.float32
        wanted = weight.double() + alpha * change
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(corrected(weight, h, cross, 0.0, 0.05), weight)


def test_corrected_weights_make_up_for_other_inputs() -> None:
    """With `C = sum (x - z) z^T` and no ridge to speak of, W* z is nearest to W x."""
    rng = torch.Generator().manual_seed(4)
    weight = torch.randn(5, 20, generator=rng)
    source = torch.randn(500, 20, generator=rng)
    seen = source @ (torch.eye(20) + 0.1 * torch.randn(20, 20, generator=rng))
    h, cross = seen.T @ seen, (source - seen).T @ seen
    found = corrected(weight, (h + h.T) / 2, cross, 1.0, 1e-6)
    before = float((source @ weight.T - seen @ weight.T).square().sum())
    after = float((source @ weight.T - seen @ found.T).square().sum())
    assert after < 1e-3 * before


SETTINGS = {
    "default": "pass",
    "older, CUDA": "torch.backends.cuda.matmul.allow_tf32 = True",
    "older": 'torch.set_float32_matmul_precision("medium")',
    "newer, CUDA": 'torch.backends.cuda.matmul.fp32_precision = "tf32"',
    "newer": 'torch.backends.fp32_precision = "tf32"',
}


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9"
)
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_products_are_in_full_precision_whatever_was_set(setting: str, python: Forks) -> None:
    code = f"""
import torch
from irq_convert.core.solver.moments import full_precision

def seen():
    knobs = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends
    return [knob.fp32_precision for knob in knobs]

def older():
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "refused"

{SETTINGS[setting]}
before = seen(), older()
with full_precision():
    assert seen()[:2] == ["ieee", "ieee"]
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.matmul.allow_tf32 is False
assert (seen(), older()) == before
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
