"""Commands to run and a source for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .process import Commands
from .sources import make_source


@pytest.fixture(scope="session")
def irq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    scratch = tmp_path_factory.mktemp("streams")
    for folder in (scratch, scratch.parent):
        folder.chmod(0o755)
    commands = Commands(scratch)
    yield commands
    commands.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")
