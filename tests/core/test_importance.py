"""The search weighed by importance: kernel against torch, against brute force, and its edges."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.importance import MOST_SHARE, Shares, column_shares
from irq_convert.core.quantize import quantize_tensor, quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.core.spec import BLOCK_SIZES, QuantSpec
from irq_convert.core.tensor_stats import TensorStats
from irq_convert.errors import IrqError, UsageError

from .test_quantize import KINDS, make, same_bytes
from .test_quantize import specs as floats
from .test_zero_points import specs as integers

F32 = np.float32
SLOW = pytest.mark.slow
WEIGHINGS = ("steep", "equal", "few", "none", "huge")


def importance(kind: str, matrices: int, cols: int, seed: int) -> np.ndarray:
    """Importance of one kind, float64 `[matrices, cols]`."""
    rng = np.random.default_rng(seed)
    drawn = rng.exponential(1.0, (matrices, cols)) ** 3
    return {
        "steep": drawn,
        "equal": np.ones_like(drawn),
        "few": np.where(rng.random(drawn.shape) < 0.1, drawn, 0.0),
        "none": np.zeros_like(drawn),
        "huge": drawn * 1e300,
    }[kind]


def assert_equal(
    ours: tuple[QuantizedTensor, TensorStats], theirs: tuple[QuantizedTensor, TensorStats]
) -> None:
    assert same_bytes(ours[0], theirs[0])
    assert (ours[1].plain, ours[1].stored) == (theirs[1].plain, theirs[1].stored)
    assert ours[1].energies.tobytes() == theirs[1].energies.tobytes()


@settings(max_examples=60)
@given(
    st.one_of(floats, integers),
    st.sampled_from(KINDS),
    st.sampled_from(WEIGHINGS),
    st.integers(1, 3),
    st.integers(1, 14),
    st.integers(1, 200),
    st.integers(0, 99),
)
def test_kernel_and_torch_give_the_same_bytes(
    spec: QuantSpec, kind: str, weighing: str, matrices: int, rows: int, cols: int, seed: int
) -> None:
    weight = make(kind, matrices * rows, cols, seed)
    shares = column_shares(
        importance(weighing, matrices, cols, seed), rows, spec.block_size, "stack"
    )
    ours, theirs = (
        quantize_with_stats(weight, spec, shares=shares, backend=backend)
        for backend in ("numba", "torch")
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("codebook", ["nf3", "int4"])
def test_every_block_size_has_its_tails(codebook: str, block_size: int) -> None:
    spec = QuantSpec(codebook, block_size, "mse", 2)
    weight = make("student", 3, block_size + 9, block_size)
    shares = column_shares(importance("steep", 1, block_size + 9, 5), 3, block_size, "weight")
    ours, theirs = (
        quantize_with_stats(weight, spec, shares=shares, backend=backend)
        for backend in ("numba", "torch")
    )
    assert_equal(ours, theirs)


def window(block: np.ndarray, uniform: bool) -> tuple[F32, F32]:
    """Where the search for squared error starts, and how far it looks for tau."""
    low, high = block.min(), block.max()
    if uniform:
        return (low + high) * F32(0.5), F32(0.2) * ((high - low) * F32(0.5))
    middle = np.sort(block)[(len(block) - 1) // 2]
    return middle, F32(0.2) * max(high - middle, middle - low)


def candidates(block: np.ndarray, q: QuantizedTensor, uniform: bool) -> list[tuple[F32, F32]]:
    """Every (tau, scale) on the path for squared error, from docs/method.md; one group."""
    assert q.scale_grid is not None
    assert q.tau_grid is not None
    step, offset = q.tau_grid[0].numpy()
    scale_step, scale_offset = q.scale_grid[0].numpy()
    inverse, scale_inverse = F32(1) / step, F32(1) / scale_step
    center, radius = window(block, uniform)
    first = max(0, int(np.ceil((center - radius) * inverse - offset)))
    last = min(255, int(np.floor((center + radius) * inverse - offset)))
    if last < first:
        first = last = int(np.clip(np.rint(center * inverse) - offset, 0, 255))
    found = []
    for code in range(first, last + 1, (last - first) // 32 + 1):
        tau = step * (F32(code) + offset)
        base = max(block.max() - tau, tau - block.min())
        if uniform:
            base = (block.max() - block.min()) * F32(0.5)
        for factor in np.array([1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6], F32):
            near = np.clip(np.rint(base * factor * scale_inverse) - scale_offset, 0, 255)
            found.append((tau, scale_step * (F32(near) + scale_offset)))
    return found


def weighted_error(
    block: np.ndarray, shares: np.ndarray, pair: tuple[F32, F32], spec: QuantSpec
) -> int:
    """Sum of share times squared error, weight by weight, in the fixed point of the search."""
    tau, scale = pair
    bits = min(20, 28 - spec.block_size.bit_length() + 1 - 8)
    unit = 2.0 ** (bits - np.frexp(np.abs(block).max())[1])
    edges = tau + spec.book.midpoint_array() * scale
    codes = (block[:, None] >= edges[None]).sum(1)
    value = spec.book.level_array()[codes] * scale + tau
    wrong = np.rint(value.astype(np.float64) * unit) - np.rint(block.astype(np.float64) * unit)
    return sum(int(s) * int(e) ** 2 for s, e in zip(shares, wrong, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("codebook", sorted(CODEBOOKS))
@pytest.mark.parametrize(
    "kind", ["gauss", "equal", *(pytest.param(k, marks=SLOW) for k in ("student", "outlier"))]
)
def test_nothing_on_the_path_has_less_weighted_error(codebook: str, kind: str) -> None:
    spec = QuantSpec(codebook, 32, "mse")
    weight = make(kind, 6, 90, 3)
    shares = column_shares(importance("steep", 2, 90, 4), 3, 32, "weight")
    q, _ = quantize_with_stats(weight, spec, shares=shares)
    tau, scale = (
        expand_statistic(each, grid).numpy()
        for each, grid in ((q.tau, q.tau_grid), (q.scale, q.scale_grid))
    )
    differs = 0
    for row in range(6):
        for at, start in enumerate(range(0, 90, 32)):
            block = weight[row, start : start + 32].numpy()
            own = shares.values[row // 3, start : start + 32]
            if block.min() == block.max():
                continue
            listed = candidates(block, q, spec.book.uniform)
            mine = weighted_error(block, own, (tau[row, at], scale[row, at]), spec)
            assert mine == min(weighted_error(block, own, pair, spec) for pair in listed)
            best = min(weighted_error(block, np.ones_like(own), pair, spec) for pair in listed)
            stored = (tau[row, at], scale[row, at])
            differs += weighted_error(block, np.ones_like(own), stored, spec) > best
    # Beside an outlier the grids leave little to choose.
    assert differs > 3 or kind == "outlier", "the shares decide nothing here"


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64, "mse", 2), QuantSpec("int3", 32, "entropy")])
@pytest.mark.parametrize("factor", [2.0**-700, 3e-9, 7.0, 2.0**500])
def test_only_proportions_count(spec: QuantSpec, factor: float) -> None:
    weight, given = make("student", 8, 150, 1), importance("steep", 1, 150, 2)[0]
    whole = column_shares(given, 8, spec.block_size, "weight")
    scaled = column_shares(given * factor, 8, spec.block_size, "weight")
    assert (whole.values == scaled.values).all()
    assert same_bytes(
        quantize_tensor(weight, spec, importance=given),
        quantize_tensor(weight, spec, importance=torch.from_numpy(given * factor)),
    )


@pytest.mark.parametrize("codebook", sorted(CODEBOOKS))
def test_equal_importance_is_none_up_to_fixed_point(codebook: str) -> None:
    """A share takes eight bits of the fixed point, which only near ties can tell."""
    spec, weight = QuantSpec(codebook, 64, "mse"), make("gauss", 32, 256, 7)
    shares = column_shares(np.full(256, 0.3), 32, 64, "weight")
    assert (shares.values == MOST_SHARE).all()
    plain, expected = quantize_with_stats(weight, spec)
    found, stats = quantize_with_stats(weight, spec, shares=shares)
    assert (plain.tau != found.tau).float().mean() < 0.02
    assert stats.energies[:, 0].tobytes() == expected.energies[:, 0].tobytes()
    assert stats.squared_error == pytest.approx(expected.squared_error, rel=1e-5)
    assert stats.plain == expected.plain


@pytest.mark.parametrize("codebook", ["nf2", "nf3", "int3", "int4"])
@pytest.mark.parametrize("zero_point", ["float", "integer"])
def test_the_weighted_error_falls(codebook: str, zero_point: str) -> None:
    if zero_point == "integer" and codebook.startswith("nf"):
        zero_point = "float"
    spec = QuantSpec(codebook, 64, "mse", 3, zero_point)
    weight, given = make("gauss", 32, 256, 8), importance("steep", 1, 256, 9)[0]

    def error(q: QuantizedTensor) -> float:
        wrong = (dequantize_tensor(q) - weight).double().numpy()
        return float((wrong**2 * given).sum())

    weighed = error(quantize_tensor(weight, spec, importance=given))
    assert weighed < 0.97 * error(quantize_tensor(weight, spec))


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_each_matrix_of_a_stack_has_its_own_shares(backend: str) -> None:
    """64 rows of four blocks fill a group, so a stack is its matrices one below the other."""
    spec = QuantSpec("nf3", 16, "mse", 2)
    weight, given = make("student", 192, 64, 2), importance("steep", 3, 64, 3)
    shares = column_shares(given, 64, 16, "experts")
    whole, stats = quantize_with_stats(weight, spec, shares=shares, backend=backend)
    alone = [
        quantize_tensor(weight[64 * i : 64 * i + 64], spec, importance=given[i], backend=backend)
        for i in range(3)
    ]
    for suffix, tensor in whole.parts().items():
        assert torch.equal(tensor, torch.cat([q.parts()[suffix] for q in alone])), suffix
    tiles = [
        quantize_with_stats(weight[at : at + 64], spec, shares=shares, first_row=at)
        for at in (0, 64, 128)
    ]
    assert all(same_bytes(one, tile) for one, (tile, _) in zip(alone, tiles, strict=True))
    assert stats.squared_error == sum((s for _, s in tiles[1:]), tiles[0][1]).squared_error


def test_owners_of_rows() -> None:
    shares = Shares(np.ones((3, 4), np.int32), 5)
    assert shares.owners(3, 11).tolist() == [0, 0, 1, 1, 1, 1, 1, 2]
    assert shares.owners(0, 0).size == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, -1e-300])
def test_unusable_importance_is_refused_by_name(bad: float) -> None:
    given = torch.ones(70, dtype=torch.float64)
    given[69] = bad
    with pytest.raises(IrqError, match=r"^layers\.7\.weight: its importance has NaN[^\n]*$"):
        quantize_tensor(make("gauss", 4, 70), importance=given, name="layers.7.weight")


def test_importance_of_another_shape_is_refused() -> None:
    weight = make("gauss", 4, 70)
    for wrong in (torch.ones(69), torch.ones(4), torch.ones(4, 70), torch.ones(1, 70)):
        with pytest.raises(UsageError, match=r"^w \[4, 70\]: importance has shape \[[^\n]*$"):
            quantize_tensor(weight, importance=wrong, name="w")
    for wrong in (np.ones((2, 2, 2)), np.ones(0)):
        with pytest.raises(UsageError, match=r"^w: importance has shape \[[^\n]*$"):
            column_shares(wrong, 4, 64, "w")


def assert_proportional(given: np.ndarray) -> None:
    """Shares of blocks of 16: the quotients in exact numbers, rounded, from 1 to the most."""
    shares = column_shares(given, 2, 16, "w").values
    assert shares.dtype == np.int32
    assert shares.shape == (1, len(given))
    assert 1 <= shares.min() <= shares.max() <= MOST_SHARE
    for start in range(0, len(given), 16):
        block, own = given[start : start + 16], shares[0, start : start + 16]
        if not block.max():
            assert (own == 1).all()
            continue
        assert own[block.argmax()] == MOST_SHARE
        assert (np.diff(own[block.argsort()]) >= 0).all()
        exact = [float(Fraction(x) / Fraction(block.max()) * MOST_SHARE) for x in block.tolist()]
        assert (np.abs(own - np.maximum(1, exact)) <= 0.5 + 1e-9).all()


@settings(max_examples=100)
@given(
    st.lists(
        st.one_of(st.just(0.0), st.sampled_from([1e-300, 1e308]), st.floats(2.0**-1000, 1.7e308)),
        min_size=1,
        max_size=60,
    )
)
def test_shares_of_small_and_huge_numbers(values: list[float]) -> None:
    with np.errstate(all="raise", under="ignore"):
        assert_proportional(np.array(values))


@pytest.mark.parametrize(
    "values", [[5e-324], [5e-324, 1e-323, 0.0], [1e-310, 3e-310, 2e-310], [4e-309, 0.0, 1e-320]]
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_shares_of_denormals(values: list[float]) -> None:
    assert_proportional(np.array(values))
