"""The maps of IEC and of block pooling, against the method's formulas written out in full."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.core.elastic import (
    block_sums,
    block_weights,
    elastic,
    fold_elastic,
    repeat_blocks,
)
from tests.core.elastic_matrix import elastic_matrix

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**31)


def averaging(rank: int, inputs: int) -> np.ndarray:
    """The method's P, entry by entry: g/h where i // (h/g) == j // (r/g), g = gcd(h, r)."""
    g = math.gcd(inputs, rank)
    p = np.zeros((rank, inputs))
    for j in range(rank):
        for i in range(inputs):
            if i // (inputs // g) == j // (rank // g):
                p[j, i] = g / inputs
    return p


def repeating(outputs: int, rank: int) -> np.ndarray:
    """The method's E, entry by entry: g/r where k // (o/g) == j // (r/g), g = gcd(o, r)."""
    g = math.gcd(outputs, rank)
    e = np.zeros((outputs, rank))
    for k in range(outputs):
        for j in range(rank):
            if k // (outputs // g) == j // (rank // g):
                e[k, j] = g / rank
    return e


def pooling(inputs: int, block_size: int) -> np.ndarray:
    """Block sums as a matrix `[blocks, inputs]`."""
    blocks = -(-inputs // block_size)
    s = np.zeros((blocks, inputs))
    for i in range(inputs):
        s[i // block_size, i] = 1
    return s


def randn(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@settings(max_examples=50)
@given(SIZES, SIZES)
def test_matrix_is_both_of_the_methods(rows: int, cols: int) -> None:
    found = elastic_matrix(rows, cols)
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found.numpy(), averaging(rows, cols))
    np.testing.assert_array_equal(found.numpy(), repeating(rows, cols))


@settings(max_examples=50)
@given(SIZES, SIZES)
def test_matrix_gives_every_row_a_mean(rows: int, cols: int) -> None:
    torch.testing.assert_close(elastic_matrix(rows, cols).sum(1), torch.ones(rows).double())


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 8), SEEDS)
def test_divisible_averaging_is_the_mean_of_contiguous_groups(
    rank: int, length: int, seed: int
) -> None:
    x = randn(seed, rank * length)
    wanted = torch.stack([part.mean() for part in x.split(length)])
    torch.testing.assert_close(elastic(x, rank), wanted)


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 8), SEEDS)
def test_divisible_repeating_is_repeat_interleave(rank: int, times: int, seed: int) -> None:
    z = randn(seed, rank)
    assert torch.equal(elastic(z, rank * times), z.repeat_interleave(times))
    assert elastic(z, rank * times).tolist() == [v for v in z.tolist() for _ in range(times)]


@settings(max_examples=50)
@given(SIZES, SIZES, SEEDS, st.sampled_from([(), (3,), (2, 3)]))
def test_elastic_applies_the_matrix(
    rows: int, cols: int, seed: int, batch: tuple[int, ...]
) -> None:
    x = randn(seed, *batch, cols)
    torch.testing.assert_close(elastic(x, rows), x @ elastic_matrix(rows, cols).T)
    assert elastic(x.bfloat16(), rows).dtype == torch.bfloat16


@settings(max_examples=50)
@given(SIZES, SIZES, SEEDS, st.booleans())
def test_fold_adds_the_matrix(rows: int, cols: int, seed: int, weighted: bool) -> None:
    weight, beta, columns = randn(seed, rows, cols), randn(seed + 1), randn(seed + 2, cols)
    kept = weight.clone()
    found = fold_elastic(weight, beta, columns if weighted else None)
    m = torch.from_numpy(averaging(rows, cols))
    torch.testing.assert_close(found, weight + beta * (m * columns if weighted else m))
    assert torch.equal(weight, kept)
    assert found.is_contiguous()


@settings(max_examples=50)
@given(SIZES, SIZES, SEEDS)
def test_folding_is_connecting(rank: int, inputs: int, seed: int) -> None:
    """The symmetric pair: what `fold_elastic` adds to a weight, `elastic` adds to its output."""
    weight, beta, x = randn(seed, rank, inputs), randn(seed + 1), randn(seed + 2, 5, inputs)
    torch.testing.assert_close(
        x @ fold_elastic(weight, beta).T, x @ weight.T + beta * elastic(x, rank)
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(4, 12), (6, 4), (5, 7), (6, 6), (1, 5), (9, 1)])
def test_fold_gradients(shape: tuple[int, int], weighted: bool) -> None:
    rows, cols = shape
    weight = randn(0, rows, cols).requires_grad_()
    beta = randn(1).requires_grad_()
    columns = randn(2, cols) if weighted else None
    assert torch.autograd.gradcheck(fold_elastic, (weight, beta, columns))
    assert torch.autograd.gradgradcheck(fold_elastic, (weight, beta, columns))


def test_fold_takes_views_and_gradients_of_any_layout() -> None:
    base = randn(0, 12, 8).requires_grad_()
    betas = randn(1, 2).requires_grad_()
    found = fold_elastic(base.T, betas[1])
    torch.testing.assert_close(found, base.T + betas[1] * elastic_matrix(8, 12))
    (found.T * randn(2, 12, 8)).sum().backward()
    assert base.grad is not None
    assert betas.grad is not None
    torch.testing.assert_close(base.grad, randn(2, 12, 8))
    wanted = (randn(2, 12, 8).T * elastic_matrix(8, 12)).sum()
    torch.testing.assert_close(betas.grad, torch.stack([torch.zeros(()).double(), wanted]))
    grad = torch.autograd.grad(fold_elastic(base.T, betas[0]).sum(), base)[0]  # expanded ones
    assert torch.equal(grad, torch.ones(12, 8).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fold_keeps_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6).to(dtype).requires_grad_()
    beta = torch.tensor(0.5, requires_grad=True)
    found = fold_elastic(weight, beta, block_weights(6, 1))
    assert found.dtype == dtype
    torch.testing.assert_close(found, weight + (0.5 * elastic_matrix(4, 6)).to(dtype))
    found.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    assert beta.grad is not None
    assert beta.grad.dtype == torch.float32


@settings(max_examples=50)
@given(SIZES, st.integers(1, 12), SEEDS)
def test_block_sums(cols: int, block_size: int, seed: int) -> None:
    x = randn(seed, 3, cols)
    wanted = x @ torch.from_numpy(pooling(cols, block_size)).T
    torch.testing.assert_close(block_sums(x, block_size), wanted)
    torch.testing.assert_close(block_sums(x[0], block_size), wanted[0])


@settings(max_examples=50)
@given(SIZES, st.integers(1, 12), SEEDS)
def test_repeating_blocks_is_the_adjoint_of_summing_them(
    cols: int, block_size: int, seed: int
) -> None:
    blocks = -(-cols // block_size)
    x, weight = randn(seed, 4, cols), randn(seed + 1, 3, blocks)
    repeated = repeat_blocks(weight, cols, block_size)
    assert repeated.shape == (3, cols)
    torch.testing.assert_close(block_sums(x, block_size) @ weight.T, x @ repeated.T)
    for i in range(cols):
        assert torch.equal(repeated[:, i], weight[:, i // block_size])


@settings(max_examples=50)
@given(SIZES, st.integers(1, 12), SEEDS)
def test_block_weights_make_means_of_sums(cols: int, block_size: int, seed: int) -> None:
    x = randn(seed, cols)
    weights = block_weights(cols, block_size)
    assert weights.dtype == torch.float64
    wanted = torch.stack([part.mean() for part in x.split(block_size)])
    torch.testing.assert_close(block_sums(x, block_size) * weights, wanted)


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), SEEDS)
def test_pooled_connection_is_the_plain_one_where_blocks_fit_into_groups(
    rank: int, per_group: int, block_size: int, seed: int
) -> None:
    """When every group of inputs is whole blocks, P of block means is P of the inputs."""
    inputs = rank * per_group * block_size
    x = randn(seed, inputs)
    means = block_sums(x, block_size) * block_weights(inputs, block_size)
    torch.testing.assert_close(elastic(means, rank), elastic(x, rank))
