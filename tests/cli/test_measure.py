"""`measure` and `quantize --importance` as they are meant to be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from irq_convert.artifact.importance import read_importance
from tests.folders import listing
from tests.jobs.finetune.base import write_tales
from tests.paths import DEMO

from .process import Commands, nothing_left

SMALL = ("--tokens", 512, "--window", 64, "--threads", 1)


@pytest.fixture
def text(work: Path) -> Path:
    write_tales(work / "tales.txt", 12)
    return work / "tales.txt"


def test_from_a_text_to_an_artifact(irq: Commands, work: Path, text: Path) -> None:
    file, out = work / "importance.safetensors", work / "out"
    result = irq("measure", DEMO, file, "--text", text, *SMALL)
    assert (result.code, result.err) == (0, "")
    found = read_importance(file)
    assert f"{DEMO}, run layer by layer" in result.out
    assert "512 tokens of tales.txt, in 8 windows" in result.out
    assert f"{len(found.values)} of {len(found.values)} linear weights" in result.out
    assert str(file) in result.out
    result = irq("quantize", DEMO, out, "--bits", 2, "--importance", file, "--threads", 1)
    assert result.code == 0
    line = "importance.safetensors (irq importance): 512 tokens of tales.txt"
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
