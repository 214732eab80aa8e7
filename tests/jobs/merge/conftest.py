"""Artifacts that no test may change, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .make import make_artifact, write_adapter


@pytest.fixture(scope="session")
def artifact(tiny_nf4: Path) -> Path:
    return tiny_nf4


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nf3, from bfloat16, with one layer kept dense."""
    folder = tmp_path_factory.mktemp("half") / "half-irq"
    return make_artifact(folder, "nf3", torch.bfloat16, keep=[r"layers\.0\.mlp\.down_proj"])


@pytest.fixture(scope="session")
def iec(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("iec") / "iec", artifact)


@pytest.fixture(scope="session")
def block(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("block") / "block", artifact, kind="block")
