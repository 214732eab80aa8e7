"""`quantize` of a Hub id, with the Hub played by a server on loopback."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoint.hub_server import COMMIT, FakeHub, serve
from tests.folders import listing
from tests.jobs.push.server import serve as serve_world
from tests.jobs.push.state import World

from .process import Commands, assert_fails, nothing_left
from .sources import make_source
from .stopping import await_moment

Settings = Callable[[str], dict[str, str]]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with serve(make_source(tmp_path / "repo", rows=2500)) as server:
        yield server


@pytest.fixture
def own(hub: FakeHub, hub_settings: Settings) -> dict[str, str]:
    return hub_settings(hub.url)


@pytest.mark.slow
def test_a_model_from_the_hub(
    irq: Commands, hub: FakeHub, own: dict[str, str], tmp_path: Path, work: Path
) -> None:
    args = ("quantize", "org/model", "--bits", 3, "--json")
    result = irq(*args, "--dry-run", cwd=work, **own)
    assert result.code == 0, result
    report = json.loads(result.out)
    assert report["out"] == "model-irq-nf3"
    assert report["fetched"] == (tmp_path / "repo" / "model.safetensors").stat().st_size
    assert report["fetched_to"] == own["HF_HUB_CACHE"]
    assert [p.name for p in work.iterdir()] == ["home"]
    assert hub.sent["model.safetensors"] < (tmp_path / "repo" / "model.safetensors").stat().st_size
    result = irq(*args, cwd=work, **own)
    assert result.code == 0, result
    manifest = json.loads((work / "model-irq-nf3" / "irq_manifest.json").read_text())
    assert manifest["source"]["model"] == "org/model"
    assert manifest["source"]["revision"] == COMMIT
    local = irq("quantize", tmp_path / "repo", work / "local", "--bits", 3)
    assert local.code == 0
    both = listing(work / "local"), listing(work / "model-irq-nf3")
    assert both[0].pop("irq_manifest.json") != both[1].pop("irq_manifest.json")
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/missing", ["org/missing", "check the spelling"]),
        ("org/gated", ["org/gated", "accept its terms", "hf auth login"]),
    ],
)
def test_models_that_the_hub_refuses(
    irq: Commands, own: dict[str, str], tmp_path: Path, work: Path, model: str, words: list[str]
) -> None:
    with nothing_left(tmp_path / "repo"):
        assert_fails(irq("quantize", model, cwd=work, **own), 1, *words)
    assert [p.name for p in work.iterdir() if p.name != "home"] == []


def test_a_source_is_verified_at_the_commit_it_was_taken_from(
    irq: Commands, tmp_path: Path, work: Path, hub_settings: Settings
) -> None:
    """The branch may have moved since, and that is no damage."""
    world = World()
    first, second = (make_source(tmp_path / str(seed), seed=seed) for seed in range(2))
    repo = world.add("org/model", {p.name: p.read_bytes() for p in first.iterdir()})
    commit = repo.branches["main"]
    with serve_world(world) as hub:
        own = hub_settings(hub.url)
        assert irq("quantize", "org/model", "out", cwd=work, **own).code == 0
        repo.commit("main", {p.name: p.read_bytes() for p in second.iterdir()}, "moved")
        args = ("verify", "out", "--against", "org/model")
        result = irq(*args, cwd=work, **own)
        assert (result.code, result.err) == (0, ""), result
        moved = irq(*args, "--revision", "main", cwd=work, **own)
    assert moved.code == 1
    (line,) = moved.out.splitlines()
    assert f"another revision of it: give 'org/model' at revision {commit}" in line


LAST = "model-00003-of-00003.safetensors"


@pytest.mark.slow
def test_a_streamed_conversion_that_is_killed_goes_on(
    irq: Commands, tmp_path: Path, work: Path, hub_settings: Settings
) -> None:
    home = work / "home"
    source = make_source(tmp_path / "repo", shards=3)
    args = ["quantize", "org/model", "out", "--stream", "--max-shard-size", "0.00002"]
    with serve(source) as hub:
        slow = hub.fail("slow", "^/storage/.*00003-of", times=1000, pause=0.5)
        own, last = hub_settings(hub.url), "^/storage/.*00003-of"
        running = irq.start(*args, cwd=work, **own)
        assert await_moment(running, lambda: len(hub.asked("GET", last)) >= 2)  # after its header
        running.kill()
        assert running.wait().code == -signal.SIGKILL
        assert not (work / "out").exists()
        slow.times = 0
        left = next((home / "irq-convert" / "streamed").glob("*/*/0")) / LAST
        left.write_bytes((source / LAST).read_bytes())
        assert irq(*args, "--dry-run", cwd=work, **own).code == 0
        assert left.is_file()  # a dry run takes nothing from the next
        result = irq(*args, cwd=work, **own)
    assert result.code == 0, result
    assert not (work / "out.partial").exists()
    assert not (home / "irq-convert" / "streamed").exists() or not any(
        (home / "irq-convert" / "streamed").rglob("*.safetensors")
    )
    local = irq("quantize", source, work / "local", *args[4:])
    assert local.code == 0, local
    both = listing(work / "local"), listing(work / "out")
    assert both[0].pop("irq_manifest.json") != both[1].pop("irq_manifest.json")
    assert both[0] == both[1]
