"""A source and its artifact, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from .helpers import copy, make_artifact, make_source


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.fixture(scope="session")
def pristine(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that no test may change."""
    return make_artifact(source, tmp_path_factory.mktemp("artifact") / "tiny-irq")


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return copy(pristine, tmp_path / "artifact")
