"""Folding against the dense matrices of the method, and against the unfolded layer."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.artifact.adapter import LayerValues
from irq_convert.core.elastic import fold_elastic
from irq_convert.jobs.merge.check_layers import unfolded_output
from irq_convert.jobs.merge.delta import Delta, fold_layer
from tests.core.elastic_matrix import elastic_matrix

sizes = st.integers(1, 40)
numbers = st.floats(-3, 3, width=32)


def make_values(
    rank: int, cols: int, out: int, beta: tuple[float, float], block: int | None, seed: int
) -> LayerValues:
    generator = torch.Generator().manual_seed(seed)
    inputs = cols if block is None else -(-cols // block)
    a = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    return LayerValues(a, torch.randn(out, rank, generator=generator, dtype=torch.float64), beta)


@settings(max_examples=150)
@given(sizes, sizes, sizes, numbers, numbers, st.sampled_from([None, 4, 16]), st.integers(0, 99))
def test_delta_is_what_the_matrices_of_the_method_give(
    rank: int, cols: int, out: int, one: float, two: float, block: int | None, seed: int
) -> None:
    values = make_values(rank, cols, out, (one, two), block, seed)
    delta = Delta.fold(values, 0.7, cols, block)
    owner = torch.arange(cols) // (block or 1)
    pool = (torch.arange(values.a.shape[1])[:, None] == owner[None, :]).double()
    mean = pool / pool.sum(1, keepdim=True)
    inner = values.a @ pool + one * elastic_matrix(rank, values.a.shape[1]) @ mean
    wanted = 0.7 * (values.b + two * elastic_matrix(out, rank)) @ inner
    assert torch.allclose(delta.rows(0, out), wanted, rtol=1e-12, atol=1e-12)
    middle = out // 2
    tiles = torch.cat([delta.rows(0, middle), delta.rows(middle, out)])
    assert torch.allclose(tiles, wanted, rtol=1e-12, atol=1e-12)
    if block is not None:
        assert torch.equal(delta.block_rows(0, out)[:, owner], delta.rows(0, out))


@settings(max_examples=100)
@given(sizes, sizes, sizes, numbers, numbers, st.sampled_from([None, 4, 16]), st.integers(0, 99))
def test_folded_and_unfolded_layers_compute_the_same(
    rank: int, cols: int, out: int, one: float, two: float, block: int | None, seed: int
) -> None:
    values = make_values(rank, cols, out, (one, two), block, seed)
    x = torch.randn(cols, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    folded = Delta.fold(values, 1.3, cols, block).rows(0, out) @ x
    unfolded = unfolded_output(values, 1.3, x, block)
    size = float(unfolded.abs().max())
    assert torch.allclose(folded, unfolded, rtol=1e-11, atol=1e-12 * max(1.0, size))


@settings(max_examples=100)
@given(sizes, sizes, numbers, st.integers(0, 99))
def test_folding_the_negative_unfolds(rows: int, cols: int, beta: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    one = torch.tensor(beta, dtype=torch.float64)
    there = fold_elastic(weight, one)
    assert torch.allclose(fold_elastic(there, -one), weight, rtol=0, atol=1e-14)
    difference = float((there - weight).abs().sum())
    assert math.isclose(difference, abs(beta) * rows, rel_tol=1e-9, abs_tol=1e-12)


def test_a_change_of_nothing_is_known() -> None:
    values = make_values(4, 12, 9, (0.0, 0.0), None, 0)
    assert not Delta.fold(values, 1.0, 12, None).is_zero
    none = LayerValues(values.a, torch.zeros_like(values.b), (2.0, 0.0))
    assert Delta.fold(none, 1.0, 12, None).is_zero
    moved = LayerValues(values.a, torch.zeros_like(values.b), (0.0, 0.5))
    assert not Delta.fold(moved, 1.0, 12, None).is_zero


def test_the_file_is_not_changed_by_folding() -> None:
    values = make_values(4, 12, 8, (0.5, 0.5), None, 0)
    before = values.a.clone(), values.b.clone()
    fold_layer(values, 12, None)
    assert torch.equal(values.a, before[0])
    assert torch.equal(values.b, before[1])
