"""The solver's Triton kernels under the interpreter: cases that `test_triton.py` runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.solver import portable
from irq_convert.core.solver.options import SolverOptions
from irq_convert.core.spec import BLOCK_SIZES, QuantSpec
from irq_convert.core.triton.descend import descend_panel_triton
from irq_convert.core.triton.sweep import sweep_panel_triton

from ..test_quantize import same_bytes
from ..triton_haste import in_fewer_operations
from .make import problem, solve_matrix
from .test_solve import integers, specs

assert os.environ["TRITON_INTERPRET"] == "1", "run by test_triton.py"
warnings.filterwarnings("ignore", "invalid value|divide by zero|overflow", RuntimeWarning)


@pytest.fixture(autouse=True, scope="module")
def _in_fewer_operations() -> Iterator[None]:
    with in_fewer_operations():
        yield


def book_of(codebook: str) -> portable.Book:
    book = CODEBOOKS[codebook]
    levels, mids = (torch.from_numpy(a) for a in (book.level_array(), book.midpoint_array()))
    return portable.Book(64, levels, mids)


shapes = st.integers(1, 40), st.integers(1, 70), st.integers(0, 99)


@settings(max_examples=4)
@given(st.sampled_from(sorted(CODEBOOKS)), *shapes)
def test_a_panel_is_swept_as_in_torch(codebook: str, rows: int, width: int, seed: int) -> None:
    """Column by column the same operations, so the same bits; the feedback is part of a wider."""
    rng = torch.Generator().manual_seed(seed)
    weight, value, scale, tau = torch.randn(4, rows, width, generator=rng)
    feedback = (0.3 * torch.randn(width, width + 5, generator=rng))[:, 3 : 3 + width]
    given = weight, value, scale.abs() + 0.1, 0.1 * tau, feedback, book_of(codebook)
    assert not given[4].is_contiguous() or width == 1
    for ours, theirs in zip(sweep_panel_triton(*given), portable.sweep_panel(*given), strict=True):
        assert torch.equal(ours, theirs)


@settings(max_examples=4)
@given(st.sampled_from(sorted(CODEBOOKS)), *shapes)
def test_a_block_descends_as_in_torch(codebook: str, rows: int, width: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    value, gain = torch.randn(2, rows, width, generator=rng)
    scale, tau = torch.randn(2, rows, generator=rng)
    moments = torch.randn(width, width + 4, generator=rng)[:, 2 : 2 + width]
    inverse = 1.0 / (0.5 + torch.rand(width, generator=rng))
    given = value, gain, moments, inverse, scale.abs() + 0.1, 0.1 * tau, book_of(codebook)
    assert torch.equal(descend_panel_triton(*given), portable.descend_panel(*given))


@settings(max_examples=2)
@given(st.one_of(specs, integers), st.integers(1, 12), st.integers(1, 80), st.integers(0, 99))
def test_solved_as_in_torch(spec: QuantSpec, rows: int, cols: int, seed: int) -> None:
    p, options = problem(rows, cols, seed), SolverOptions(rounds=2)
    (ours, stats), (theirs, expected) = (
        solve_matrix(p.weight, p.target, p.moments, spec, options, backend=backend)
        for backend in ("triton", "torch")
    )
    assert same_bytes(ours, theirs)
    assert (stats.plain, stats.stored) == (expected.plain, expected.stored)
    assert stats.energies.tobytes() == expected.energies.tobytes()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_blocks_of_every_size_and_tails(block_size: int) -> None:
    cols = block_size + 9 if block_size < 128 else block_size // 2 + 3
    p = problem(3, cols, block_size, cols)
    spec, options = QuantSpec("int2", block_size, "none"), SolverOptions(rounds=1)
    ours, theirs = (
        solve_matrix(p.weight, p.target, p.moments, spec, options, backend=backend)[0]
        for backend in ("triton", "torch")
    )
    assert same_bytes(ours, theirs)
