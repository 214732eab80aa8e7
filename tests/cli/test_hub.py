"""`quantize` of a Hub id, with the Hub played by a server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.hub_server import COMMIT, FakeHub, serve

from .process import ENVIRONMENT, Result, assert_fails, fresh, listing, nothing_left
from .sources import make_source


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with serve(make_source(tmp_path / "repo", rows=5000)) as server:
        yield server


def settings(hub: FakeHub, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


def run(hub: FakeHub, home: Path, *args: object) -> Result:
    return fresh("quantize", *args, cwd=home.parent, **settings(hub, home))


def test_a_model_from_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    home = work / "home"
    result = run(hub, home, "org/model", "--bits", 3, "--dry-run", "--json")
    assert result.code == 0, result
    report = json.loads(result.out)
    assert report["out"] == "model-irq-nf3"
    assert report["fetched"] == (tmp_path / "repo" / "model.safetensors").stat().st_size
    assert report["fetched_to"] == str(home / "hub")
    assert [p.name for p in work.iterdir()] == ["home"]
    assert hub.sent["model.safetensors"] < (tmp_path / "repo" / "model.safetensors").stat().st_size
    result = run(hub, home, "org/model", "--bits", 3, "--json")
    assert result.code == 0, result
    manifest = json.loads((work / "model-irq-nf3" / "irq_manifest.json").read_text())
    assert manifest["source"]["model"] == "org/model"
    assert manifest["source"]["revision"] == COMMIT
    local = fresh("quantize", tmp_path / "repo", work / "local", "--bits", 3)
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
    hub: FakeHub, tmp_path: Path, model: str, words: list[str]
) -> None:
    (tmp_path / "work").mkdir()
    with nothing_left(tmp_path / "repo"):
        assert_fails(run(hub, tmp_path / "work" / "home", model), 1, *words)
    assert [p.name for p in (tmp_path / "work").iterdir() if p.name != "home"] == []


LAST = "model-00003-of-00003.safetensors"


def test_a_streamed_conversion_that_is_killed_goes_on(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    home = work / "home"
    source = make_source(tmp_path / "repo", shards=3)
    options = ["org/model", "out", "--stream", "--max-shard-size", "0.00002"]
    with serve(source) as hub:
        slow = hub.fail("slow", "^/storage/.*00003-of", times=1000, pause=0.5)
        command = [sys.executable, "-m", "irq_convert", "quantize", *options]
        env = {**os.environ, **ENVIRONMENT, **settings(hub, home)}
        with subprocess.Popen(command, cwd=work, env=env, stderr=subprocess.PIPE) as process:
            last = "^/storage/.*00003-of"
            while len(hub.asked("GET", last)) < 2 and process.poll() is None:  # after its header
                time.sleep(0.01)
            assert process.poll() is None
            process.kill()
        assert not (work / "out").exists()
        slow.times = 0
        left = next((home / "irq-convert" / "streamed").glob("*/*/0")) / LAST
        left.write_bytes((source / LAST).read_bytes())
        assert run(hub, home, *options, "--dry-run").code == 0
        assert left.is_file()  # a dry run takes nothing from the next
        result = run(hub, home, *options)
    assert result.code == 0, result
    assert not (work / "out.partial").exists()
    assert not (home / "irq-convert" / "streamed").exists() or not any(
        (home / "irq-convert" / "streamed").rglob("*.safetensors")
    )
    local = fresh("quantize", source, work / "local", *options[3:])
    assert local.code == 0, local
    both = listing(work / "local"), listing(work / "out")
    assert both[0].pop("irq_manifest.json") != both[1].pop("irq_manifest.json")
    assert both[0] == both[1]
