"""A base model on the Hub of the tests, its artifact, and an empty Hub to push to for each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from irq_convert.core.spec import QuantSpec
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.paths import DEMO

from .client import Clock, use_hub
from .server import Hub, serve
from .state import World

BASE = "org/base"
CARD = """---
license: other
license_name: tales
license_link: LICENSE
language:
- en
- no
pipeline_tag: text-generation
tags:
- of-the-base
---

# The base

It tells tales.
"""


def base_files() -> dict[str, bytes]:
    """The demo model as a repository, with a card that has something to inherit."""
    paths = [path for path in DEMO.iterdir() if path.is_file()]
    return {path.name: path.read_bytes() for path in paths} | {"README.md": CARD.encode()}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of `org/base`, streamed from the Hub, in several shards; no test changes it."""
    world = World()
    world.add(BASE, base_files())
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch, serve(world) as server:
        use_hub(patch, server.url, folder / "home")
        options = QuantizeOptions(
            QuantSpec("nf3"),
            bits_for=(("down_proj", 4),),
            threads=1,
            stream=True,
            max_shard_bytes=250_000,
        )
        quantize(BASE, folder / "base-irq", options)
    return folder / "base-irq"


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "base-irq"))


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def server(world: World) -> Iterator[Hub]:
    with serve(world) as running:
        yield running


@pytest.fixture
def clock(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The client of this process talks to `server`, with a token that may write."""
    return use_hub(monkeypatch, server.url, tmp_path / "home", token="hf_writer")
