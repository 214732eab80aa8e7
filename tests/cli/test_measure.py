"""`measure` and `quantize --importance` as they are meant to be used."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from irq_convert.artifact.importance import read_importance
from tests.folders import change_json, listing
from tests.jobs.finetune.base import write_tales
from tests.jobs.push.server import serve
from tests.jobs.push.state import FolderRepo, World
from tests.paths import DEMO
from tests.tiny import write_tensors

from .process import Commands, nothing_left

SMALL = ("--tokens", 512, "--window", 64, "--threads", 1)


@pytest.fixture
def text(work: Path) -> Path:
    write_tales(work / "tales.txt", 12)
    return work / "tales.txt"


@pytest.mark.slow
def test_from_a_text_to_an_artifact(irq: Commands, work: Path, text: Path) -> None:
    file, out = work / "importance.safetensors", work / "out"
    result = irq("measure", DEMO, file, "--text", text, *SMALL)
    assert (result.code, result.err) == (0, "")
    found = read_importance(file)
    assert f"{DEMO}, run layer by layer" in result.out
    assert "512 tokens of tales.txt, in 8 windows" in result.out
    assert f"{len(found.values)} of {len(found.values)} linear weights" in result.out
    assert str(file) in result.out
    quantize = ("quantize", DEMO, out, "--bits", 2, "--importance", file, "--threads", 1)
    line = "importance.safetensors (irq importance): 512 tokens of tales.txt"
    assert line in irq(*quantize, "--dry-run").out
    result = irq(*quantize)
    assert result.code == 0
    assert line in result.out
    assert line in irq("inspect", out).out
    assert irq("verify", out, "--against", DEMO).code == 0
    assert sorted(path.name for path in work.iterdir()) == [file.name, "out", "tales.txt"]


def test_the_default_output_and_json(irq: Commands, work: Path, text: Path) -> None:
    args = ("measure", DEMO, "--text", text, *SMALL, "--json")
    report = json.loads(irq(*args, cwd=work).out)
    file = work / f"{DEMO.name}-importance.safetensors"
    assert report["out"] == file.name
    assert report["bytes"] == file.stat().st_size
    assert (report["tokens"], report["unreached"], report["how"]) == (512, [], "layer by layer")
    before = listing(work)
    assert json.loads(irq(*args, "--overwrite", cwd=work).out)["bytes"] == report["bytes"]
    assert listing(work) == before


def test_a_dry_run_writes_nothing(irq: Commands, work: Path, text: Path) -> None:
    args = ("measure", DEMO, work / "i.safetensors", "--text", text, *SMALL, "--dry-run")
    with nothing_left(work):
        result = irq(*args)
        found = json.loads(irq(*args, "--json").out)
    assert (result.code, result.err) == (0, "")
    assert f"{found['disk_needed']:,} bytes" in result.out
    assert "512 tokens of tales.txt" in result.out
    assert found["memory"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_nothing(irq: Commands, work: Path, number: int) -> None:
    write_tales(work / "tales.txt", 2000)
    args = ("measure", DEMO, work / "i", "--text", work / "tales.txt", "--threads", 1)
    with nothing_left(work):
        running = irq.start(*args, "--tokens", 200_000, "--window", 128)
        time.sleep(2)
        running.kill(number)
        result = running.wait()
    assert result.code != 0
    assert result.out == ""


def test_a_class_that_is_loaded_whole(irq: Commands, work: Path, text: Path) -> None:
    """A configuration that names the model without its head."""
    source, files = work / "model", [work / "a.safetensors", work / "b.safetensors"]
    shutil.copytree(DEMO, source)
    irq("measure", source, files[0], "--text", text, *SMALL)
    headless = {"architectures": ["LlamaModel"]}
    change_json(source / "config.json", lambda config: config.update(headless))
    result = irq("measure", source, files[1], "--text", text, *SMALL)
    assert result.code == 0
    assert result.err == (
        "irq-convert: the model is loaded whole, since it cannot be run layer by layer: LlamaModel "
        "is no causal language model\n"
    )
    one, other = (read_importance(file).values for file in files)
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(other[name], values, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaModel"])
@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["cached", "streamed"])
def test_from_the_hub(
    irq: Commands,
    hub_settings: Callable[[str], dict[str, str]],
    work: Path,
    text: Path,
    stream: tuple[str, ...],
    architecture: str,
) -> None:
    """Layer by layer as the files come, or whole; streamed, none of them is left."""
    source = work / "model"
    write_tensors(source, load_file(DEMO / "model.safetensors"), shards=3)
    for path in DEMO.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, source)
    named = {"architectures": [architecture]}
    change_json(source / "config.json", lambda config: config.update(named))
    files = [work / "a.safetensors", work / "b.safetensors"]
    with serve(World({"org/model": FolderRepo(source)})) as server:
        own = hub_settings(server.url)
        result = irq("measure", "org/model", files[0], "--text", text, *SMALL, *stream, **own)
    assert result.code == 0, result
    if stream and architecture == "LlamaForCausalLM":
        places = (work / "home" / "irq-convert" / "streamed", work / "home" / "hub")
        assert not any(file for place in places for file in place.rglob("*.safetensors"))
    assert irq("measure", source, files[1], "--text", text, *SMALL).code == 0
    one, other = map(read_importance, files)
    assert one.source["model"] == "org/model"
    assert one.source["tensors_sha256"] == other.source["tensors_sha256"]
    for name, values in other.values.items():
        np.testing.assert_allclose(one.values[name], values, rtol=1e-5)
