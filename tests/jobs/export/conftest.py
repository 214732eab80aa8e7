"""A model in the families' common shape, and its artifacts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .make import put_on_grid, quantized


@pytest.fixture(scope="session")
def llama(whole_blocks: Path) -> Path:
    return whole_blocks


@pytest.fixture(scope="session")
def by_bits(llama: Path, whole_int4: Path) -> dict[int, Path]:
    """int2, int3 and int4 in blocks of 32."""
    made = {bits: quantized(llama, llama.with_name(f"int{bits}"), f"int{bits}") for bits in (2, 3)}
    return {**made, 4: whole_int4}


@pytest.fixture(scope="session")
def int4(whole_int4: Path) -> Path:
    return whole_int4


@pytest.fixture(scope="session")
def nf4(whole_nf4: Path) -> Path:
    return whole_nf4


@pytest.fixture(scope="session")
def grids(by_bits: dict[int, Path]) -> dict[int, Path]:
    """The same with integer zero points."""
    found = {}
    for bits, artifact in by_bits.items():
        found[bits] = artifact.with_name(f"grid{bits}")
        shutil.copytree(artifact, found[bits])
        put_on_grid(found[bits])
    return found


@pytest.fixture(scope="session")
def on_grid(grids: dict[int, Path]) -> Path:
    return grids[4]
