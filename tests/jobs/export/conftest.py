"""A model in the families' common shape, and its artifacts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .make import put_on_grid, quantized, save_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA in bfloat16, widths 128 and 352."""
    return save_model(tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture(scope="session")
def by_bits(llama: Path) -> dict[int, Path]:
    """int2, int3 and int4 in blocks of 32."""
    return {bits: quantized(llama, llama.parent / f"int{bits}", f"int{bits}") for bits in (2, 3, 4)}


@pytest.fixture(scope="session")
def int4(by_bits: dict[int, Path]) -> Path:
    return by_bits[4]


@pytest.fixture(scope="session")
def nf4(llama: Path) -> Path:
    return quantized(llama, llama.parent / "nf4", "nf4")


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
