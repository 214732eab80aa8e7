"""The solver's Triton kernels, under the interpreter."""

from __future__ import annotations

import pytest

from ..test_triton import needs_triton, run_cases


@needs_triton
@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    run_cases("tests/core/solver", 10)
