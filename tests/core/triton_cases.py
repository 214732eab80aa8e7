"""The Triton kernels under the interpreter: cases that `test_triton.py` runs in their own process.

`TRITON_INTERPRET=1` has to be set before Triton is imported, and would change Triton for every
other test of the process. All run in the haste of `triton_haste.py`, but where a test puts back
what the device runs. Denormals in bfloat16, which the interpreter flushes when it widens them, are
not drawn.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.core.blocks import BlockShape
from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.dequantize import dequantize_rows, dequantize_tensor
from irq_convert.core.importance import Shares, column_shares
from irq_convert.core.quantize import quantize_tensor, quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.core.spec import BLOCK_SIZES, QuantSpec
from irq_convert.core.triton import dequantize as kernels
from irq_convert.core.triton import quantize as driver
from irq_convert.core.triton.arithmetic import round_down, round_even, round_up
from irq_convert.core.triton.decode import decode_rows_triton
from irq_convert.core.triton.prepare import _sort_pairs
from irq_convert.core.triton.probe import failure
from irq_convert.errors import IrqError

from .oracle import random_sample
from .test_importance import WEIGHINGS, importance
from .test_quantize import KINDS, make, same_bytes
from .triton_haste import REAL, in_fewer_operations

assert os.environ["TRITON_INTERPRET"] == "1", "run by test_triton.py"
warnings.filterwarnings("ignore", "invalid value|divide by zero|overflow", RuntimeWarning)


@pytest.fixture(autouse=True, scope="module")
def _in_fewer_operations() -> Iterator[None]:
    with in_fewer_operations():
        yield


def assert_same(
    weight: torch.Tensor, spec: QuantSpec, other: str = "numba", shares: Shares | None = None
) -> QuantizedTensor:
    """The kernels give the bytes and statistics of another backend."""
    ours, stats = quantize_with_stats(weight, spec, shares=shares, backend="triton")
    theirs, expected = quantize_with_stats(weight, spec, shares=shares, backend=other)
    assert same_bytes(ours, theirs)
    assert (stats.plain, stats.stored) == (expected.plain, expected.stored)
    assert stats.energies.tobytes() == expected.energies.tobytes()
    return ours


floats = st.builds(
    QuantSpec,
    codebook=st.sampled_from(sorted(CODEBOOKS)),
    block_size=st.sampled_from([16, 64, 256]),
    objective=st.sampled_from(["none", "entropy", "mse"]),
    refine=st.sampled_from([0, 3]),
)
integers = st.builds(
    QuantSpec,
    codebook=st.sampled_from(["int2", "int3", "int4"]),
    block_size=st.sampled_from([16, 64]),
    objective=st.sampled_from(["none", "entropy", "mse"]),
    refine=st.sampled_from([0, 3]),
    zero_point=st.just("integer"),
)


@settings(max_examples=5)
@given(floats, st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 150), st.integers(0, 99))
def test_same_bytes_as_the_cpu_kernels(
    spec: QuantSpec, kind: str, rows: int, cols: int, seed: int
) -> None:
    assert_same(make(kind, rows, cols, seed), spec)


@settings(max_examples=3)
@given(
    integers, st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 120), st.integers(0, 99)
)
def test_same_bytes_with_integer_zero_points(
    spec: QuantSpec, kind: str, rows: int, cols: int, seed: int
) -> None:
    assert_same(make(kind, rows, cols, seed), spec)


@settings(max_examples=3)
@given(
    st.one_of(floats, integers),
    st.sampled_from(KINDS),
    st.sampled_from(WEIGHINGS),
    st.integers(1, 3),
    st.integers(1, 8),
    st.integers(1, 150),
    st.integers(0, 99),
)
def test_same_bytes_weighed_by_importance(
    spec: QuantSpec, kind: str, weighing: str, matrices: int, rows: int, cols: int, seed: int
) -> None:
    given = importance(weighing, matrices, cols, seed)
    shares = column_shares(given, rows, spec.block_size, "stack")
    assert_same(make(kind, matrices * rows, cols, seed), spec, shares=shares)


@pytest.mark.parametrize("codebook", sorted(CODEBOOKS))
@pytest.mark.parametrize("objective", ["entropy", "mse"])
def test_every_weighted_search(codebook: str, objective: str) -> None:
    """Two matrices with a tail, equal weights of different shares among them.

    Every two of codebook, objective and zero point.
    """
    shares = column_shares(importance("steep", 2, 44, 6), 3, 32, "stack")
    other = ("float",) if objective == "entropy" else ("integer",)
    found = {"int2": ("float", "integer"), "int3": other, "int4": other}
    for zero_point in found.get(codebook, ("float",)):
        spec = QuantSpec(codebook, 32, objective, 2, zero_point)
        assert_same(make("equal", 6, 44, 7), spec, shares=shares)


SPECS = [
    QuantSpec("nf2", 32, "entropy", 1),
    QuantSpec("int2", 32, "entropy", 1),
    QuantSpec("nf2", 32, "mse", 1),
    QuantSpec("int2", 32, "mse", 1, "integer"),
]


@pytest.mark.parametrize("spec", SPECS)
def test_the_steps_that_run_on_the_device(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real sort and sums, every shrink factor, candidates in several steps."""
    driver._search.cache_clear()
    for real in REAL.values():
        monkeypatch.setattr(*real)
    assert_same(make("student", 5, 41, 3), spec)
    driver._search.cache_clear()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_weighed(block_size: int) -> None:
    spec, cols = QuantSpec("int2", block_size, "mse", 1), block_size + 9
    shares = column_shares(importance("few", 1, cols, 8), 2, block_size, "weight")
    assert_same(make("student", 2, cols, block_size), spec, shares=shares)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_has_its_tails(block_size: int) -> None:
    assert_same(make("student", 3, block_size + 9, block_size), QuantSpec("nf2", block_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sources_of_any_float_dtype(dtype: torch.dtype) -> None:
    assert_same(make("outlier", 9, 100, 2).to(dtype), QuantSpec("int4", 32, "entropy"))


def test_against_torch_in_chunks_and_many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks, the last one short, of a matrix that is not contiguous."""
    monkeypatch.setattr(driver, "CHUNK_WEIGHTS", 1)
    monkeypatch.setattr(*REAL["add_up"])
    spec, weight = QuantSpec("nf2", 16, "entropy"), make("scales", 300, 17, 4)
    assert BlockShape(300, 17, 16, 2).row_multiple == 128  # four programs of the search
    assert_same(weight.t().contiguous().t(), spec, "torch")
    shares = column_shares(importance("steep", 3, 17, 1), 100, 16, "stack")
    assert_same(weight, spec, "torch", shares)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -(2.0**120)])
def test_unusable_weights_are_refused_by_name(bad: float) -> None:
    weight = make("gauss", 20, 70)
    weight[19, 69] = bad
    with pytest.raises(IrqError, match=r"layers\.7\.weight \[20, 70\] has"):
        quantize_tensor(weight, QuantSpec("nf2"), backend="triton", name="layers.7.weight")


@settings(max_examples=8)
@given(
    st.sampled_from(sorted(CODEBOOKS)),
    st.sampled_from([16, 64]),
    st.sampled_from(["uint8", "float16", "float32"]),
    st.sampled_from(["uint8", "float16", "float32"]),
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(0, 99),
)
def test_dequantized_values_are_those_of_the_format(
    codebook: str, block_size: int, scale: str, tau: str, rows: int, cols: int, seed: int
) -> None:
    sample = random_sample(seed, rows, cols, codebook, block_size, scale, tau)
    begin = seed % rows
    for dtype in (torch.float32, torch.float16, torch.float64):
        dense = dequantize_rows(sample.q, begin, rows, dtype, backend="triton")
        assert torch.equal(dense, torch.from_numpy(sample.dense[begin:]).to(dtype))


@pytest.mark.parametrize("codebook", ["nf2", "int3", "nf4"])
def test_columns_are_read_out_of_wider_rows(codebook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What backward asks for: strided codes and statistics, one launch a few rows."""
    monkeypatch.setattr(kernels, "TILE_WEIGHTS", 300)
    sample = random_sample(5, 11, 150, codebook, 32)
    q, bits = sample.q, sample.q.shape.bits
    scale, tau = expand_statistic(q.scale, q.scale_grid), expand_statistic(q.tau, q.tau_grid)
    part = QuantizedTensor(
        q.codes[:, 8 * bits :], scale[:, 2:], tau[:, 2:], None, None, 86, codebook, 32
    )
    assert not part.codes.is_contiguous()
    dense = dequantize_tensor(part, backend="triton")
    assert torch.equal(dense, torch.from_numpy(sample.dense[:, 64:].copy()))


@settings(max_examples=8)
@given(
    st.sampled_from(sorted(CODEBOOKS)),
    st.sampled_from([16, 64, 1024]),
    st.sampled_from(["uint8", "float16", "float32"]),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(1, 40),
    st.integers(1, 1200),
    st.integers(1, 5),
)
def test_products_with_packed_rows(
    codebook: str,
    block_size: int,
    statistic: str,
    dtype: torch.dtype,
    rows: int,
    cols: int,
    tokens: int,
) -> None:
    sample = random_sample(cols, rows, cols, codebook, block_size, statistic, statistic)
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(rows)).to(dtype)
    found = decode_rows_triton(x, sample.q).double()
    weight = torch.from_numpy(sample.dense).double()
    bound = 1e-5 * (x.double().abs() @ weight.abs().T) + 1e-6
    assert bool(((found - x.double() @ weight.T).abs() <= bound).all())


@triton.jit
def _rounded(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    value = tl.load(x + i)
    tl.store(out + i, round_even(value))
    tl.store(out + n + i, round_down(value))
    tl.store(out + 2 * n + i, round_up(value))


def test_rounding_is_exact() -> None:
    near = [0.5, 1.5, 2.5, 0.49999997, 1e-40, 0.0, 255.5, 2.0**22 + 0.5, 2.0**23 - 0.5, 2.0**23 + 1]
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(108) * 10.0 ** rng.integers(-3, 9, 108)
    values = np.array([*near, *(-v for v in near), *drawn], np.float32)
    out = torch.empty(3, 128)
    _rounded[(1,)](torch.from_numpy(values), out, 128)
    for row, known in zip(out.numpy(), (np.rint, np.floor, np.ceil), strict=True):
        assert (row == known(values)).all()


def test_the_probe_finds_separate_roundings() -> None:
    assert failure(torch.device("cpu")) is None


@triton.jit
def _sorted(x, out, rows: tl.constexpr, n: tl.constexpr):
    at = tl.arange(0, rows)[:, None] * n + tl.arange(0, n)[None, :]
    tl.store(out + at, tl.sort(tl.load(x + at), dim=1))


def test_the_sort_that_runs_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*REAL["sort"])
    keys = torch.cat([make("equal", 2, 60), torch.full((2, 4), torch.inf)], 1)
    out = torch.empty_like(keys)
    _sorted[(1,)](keys, out, 2, 64)
    assert torch.equal(out, keys.sort(1).values)


@triton.jit
def _sorted_pairs(x, shares, out, moved, rows: tl.constexpr, n: tl.constexpr):
    at = tl.arange(0, rows)[:, None] * n + tl.arange(0, n)[None, :]
    key, share = _sort_pairs(tl.load(x + at), tl.load(shares + at))
    tl.store(out + at, key)
    tl.store(moved + at, share)


def test_shares_stay_with_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*REAL["sort"])
    keys = torch.tensor([[3.0, -torch.inf, 0.0, -2.5, torch.inf, 1e-40, -1e-40, 7.0]])
    shares = torch.tensor([[1, 2, 255, 4, 0, 6, 7, 8]], dtype=torch.int32)
    out, moved = torch.empty_like(keys), torch.empty_like(shares)
    _sorted_pairs[(1,)](keys, shares, out, moved, 1, 8)
    order = keys.argsort(1)
    assert torch.equal(out, keys.gather(1, order))
    assert torch.equal(moved, shares.gather(1, order))
