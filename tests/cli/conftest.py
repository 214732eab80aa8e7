"""Where commands run, and a source for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .sources import make_source


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An empty folder to run commands in."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def hub_settings(work: Path) -> Callable[[str], dict[str, str]]:
    """The environment of a command whose Hub is at a URL: its cache is in `work`, in `home`."""
    home = work / "home"

    def settings(url: str) -> dict[str, str]:
        return {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN": "hf_writer",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    return settings


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")
