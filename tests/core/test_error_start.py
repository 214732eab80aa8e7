"""The nearest low-rank matrix: against singular values, against descent, and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.core.error_start import DAMPING, nearest_low_rank
from irq_convert.errors import IrqError

KINDS = ("none", "columns", "full", "few tokens")


def _inputs(
    kind: str, rows: int, cols: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """A matrix, its moments, and the same moments in full, damped, `[cols, cols]`."""
    draw = torch.Generator().manual_seed(seed)
    delta = torch.randn(rows, cols, generator=draw)
    spread = torch.logspace(-1, 1, cols)
    tokens = max(1, cols // 3) if kind == "few tokens" else 4 * cols
    x = torch.randn(tokens, cols, generator=draw) * spread
    x[:, cols // 2] = 0  # an input that never comes
    full = x.T @ x
    moments = {"none": torch.ones(cols), "columns": full.diagonal().clone()}.get(kind, full)
    whole = torch.diag(moments) if moments.dim() == 1 else moments
    damped = whole.double().numpy() + DAMPING * float(whole.diagonal().mean()) * np.eye(cols)
    return delta, moments, damped


def _error(rest: np.ndarray, h: np.ndarray) -> float:
    return float(np.trace(rest @ h @ rest.T))


def _sums(cols: int, block: int) -> np.ndarray:
    """S `[blocks, cols]`."""
    return (np.arange(cols)[None] // block == np.arange(-(-cols // block))[:, None]).astype(float)


@given(
    st.sampled_from(KINDS),
    st.integers(1, 12),
    st.integers(2, 12),
    st.integers(1, 12),
    st.integers(0, 999),
)
def test_nothing_of_its_rank_is_nearer(
    kind: str, rows: int, cols: int, rank: int, seed: int
) -> None:
    delta, moments, h = _inputs(kind, rows, cols, seed)
    found = nearest_low_rank(delta, moments, rank)
    values, vectors = np.linalg.eigh(h)
    root = (vectors * np.sqrt(values)) @ vectors.T  # symmetric: another root than ours
    squares = np.linalg.svd(delta.double().numpy() @ root, compute_uv=False) ** 2
    assert found.before == pytest.approx(squares.sum(), rel=1e-5)
    assert found.left == pytest.approx(squares[rank:].sum(), rel=1e-4, abs=1e-5 * squares.sum())
    rest = (delta - found.product()).double().numpy()
    assert found.left == pytest.approx(_error(rest, h), rel=1e-4, abs=1e-5 * squares.sum())
    assert len(found.a) <= min(rank, rows, cols)


@given(
    st.sampled_from(KINDS),
    st.integers(1, 8),
    st.integers(2, 14),
    st.integers(1, 4),
    st.sampled_from([2, 4, 5]),
    st.integers(0, 999),
)
def test_no_descent_finds_a_nearer_pooled_one(
    kind: str, rows: int, cols: int, rank: int, block: int, seed: int
) -> None:
    delta, moments, h = _inputs(kind, rows, cols, seed)
    found = nearest_low_rank(delta, moments, rank, block_size=block)
    d, s = delta.double().numpy(), _sums(cols, block)
    rest = d - found.product(block, cols).double().numpy()
    assert found.left == pytest.approx(_error(rest, h), rel=1e-4, abs=1e-5 * found.before)
    cross, metric = d @ h @ s.T, s @ h @ s.T
    free = cross @ np.linalg.inv(metric)
    a = np.random.default_rng(seed).standard_normal((min(rank, rows, len(s)), len(s)))
    for _ in range(40):  # each factor in turn the best for the other
        b = cross @ a.T @ np.linalg.pinv(a @ metric @ a.T)
        a = np.linalg.pinv(b) @ free
    assert found.left <= _error(d - b @ a @ s, h) + 1e-5 * found.before


@pytest.mark.parametrize(("rows", "cols"), [(7, 11), (11, 7), (8, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_rank_takes_everything_away(kind: str, rows: int, cols: int) -> None:
    delta, moments, _ = _inputs(kind, rows, cols, 0)
    found = nearest_low_rank(delta, moments, 99)
    assert torch.allclose(found.product(), delta, atol=1e-5)
    assert found.left < 1e-9 * found.before


def test_both_factors_have_the_same_weight_whatever_the_unit_of_the_moments() -> None:
    delta, moments, _ = _inputs("full", 9, 12, 1)
    found, other = (nearest_low_rank(delta, moments * unit, 4) for unit in (1, 1e6))
    assert torch.allclose(found.a, other.a, rtol=1e-4)
    h = moments / moments.diagonal().mean()
    assert torch.allclose(
        found.b.T @ found.b, found.a @ (h + DAMPING * torch.eye(12)) @ found.a.T, atol=1e-3
    )


def test_the_same_bytes_each_time() -> None:
    delta, moments, _ = _inputs("full", 30, 40, 2)
    one, other = (nearest_low_rank(delta, moments, 8, block_size=4) for _ in range(2))
    assert torch.equal(one.a, other.a)
    assert torch.equal(one.b, other.b)


def test_what_has_no_error_gets_no_directions() -> None:
    delta = torch.zeros(6, 8)
    delta[2] = 1.0
    assert nearest_low_rank(delta, torch.ones(8), 4).a.shape == (1, 8)
    none = nearest_low_rank(torch.zeros(6, 8), torch.ones(8), 4)
    assert none.a.shape == (0, 8)
    assert none.product().abs().max() == 0
    assert (none.before, none.left) == (0, 0)


def test_moments_of_nothing_count_as_none() -> None:
    delta, _, _ = _inputs("none", 6, 8, 3)
    plain = nearest_low_rank(delta, torch.ones(8), 3)
    for moments in (torch.zeros(8), torch.zeros(8, 8)):
        assert torch.allclose(nearest_low_rank(delta, moments, 3).product(), plain.product())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_by_name(bad: float) -> None:
    delta, moments, _ = _inputs("full", 6, 8, 3)
    broken = delta.clone()
    broken[1, 1] = bad
    with pytest.raises(IrqError, match=r"q_proj\.weight: its weights"):
        nearest_low_rank(broken, moments, 3, name="q_proj.weight")
    moments[2, 2] = bad
    with pytest.raises(IrqError, match=r"q_proj\.weight: the second moments"):
        nearest_low_rank(delta, moments, 3, name="q_proj.weight")
