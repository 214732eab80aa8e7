"""Points the Hub's client of this process at the server of a test."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from irq_convert.checkpoint import hub_errors

from .server import Hub


class Clock:
    """Stands for `time.sleep`: notes what was asked for and waits a hundredth of a second."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self._sleep = time.sleep

    def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._sleep(min(seconds, 0.01))


def use_hub(
    patch: pytest.MonkeyPatch, url: str, home: Path, *, token: str | None = None, **more: object
) -> Clock:
    """Let huggingface_hub talk to `url` with its cache below `home`, and wait for nothing long."""
    values = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "DOWNLOAD_CHUNK_SIZE": 1 << 12,
        **more,
    }
    for name, value in values.items():
        patch.setattr(constants, name, value)
    for name in ("NO_PROXY", "no_proxy"):
        patch.setenv(name, "127.0.0.1,localhost")
    patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    else:
        patch.setenv("HF_TOKEN", token)
    patch.setattr(hub_errors, "PAUSES", (0.01, 0.01, 0.01))
    patch.setattr(hub_errors, "FIRST_PAUSES", (0.01, 0.01))
    clock = Clock()
    patch.setattr(time, "sleep", clock)
    close_session()
    return clock


def shards_sent(server: Hub) -> int:
    """Bytes of weight files that went to clients."""
    return sum(size for name, size in server.sent.items() if name.endswith(".safetensors"))
