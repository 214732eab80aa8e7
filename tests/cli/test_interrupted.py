"""Runs that do not come to their end: killed, interrupted, stopped, with nobody reading."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from irq_convert.checkpoint.disk import output_folder

from .process import Commands, assert_fails, listing, nothing_left
from .sources import make_source

ARGS = ("--objective", "mse", "--block-size", 16, "--max-shard-size", "1e-3", "--threads", 1)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a second or two."""
    return make_source(tmp_path_factory.mktemp("large") / "source", rows=10_000)


@pytest.fixture(scope="module")
def undisturbed(irq: Commands, large: Path) -> dict[str, object]:
    out = large.parent / "out"
    assert irq("quantize", large, out, *ARGS).code == 0
    return listing(out)


def wait_for(pattern: str, folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment(
    irq: Commands, large: Path, undisturbed: dict[str, object], tmp_path: Path, overwrite: bool
) -> None:
    out = tmp_path / "out"
    options = [*ARGS, "--overwrite"] if overwrite else list(ARGS)
    old: dict[str, object] = {}
    if overwrite:
        assert irq("quantize", large, out, "--bits", 2, *ARGS).code == 0
        old = listing(out)
    chance, killed, partial = random.Random(1), 0, 0
    for attempt in range(12):
        running = irq.start("quantize", large, out, *options)
        if attempt % 3:
            wait_for("out.partial", tmp_path)
            time.sleep(chance.uniform(0, 1.5))
        else:
            time.sleep(chance.uniform(0, 0.5))
        with contextlib.suppress(ProcessLookupError):
            running.kill(signal.SIGKILL)
        result = running.wait()
        if result.code == 0:  # it was quicker
            assert listing(out) == undisturbed
            break
        assert result.code == -signal.SIGKILL
        killed += 1
        partial += (tmp_path / "out.partial").exists()
        if overwrite:
            assert listing(out) == old
        else:
            assert not out.exists()
        whole = [p for p in tmp_path.rglob("*") if p.suffix == ".safetensors"]
        assert all("out.partial" in p.parts or out in p.parents for p in whole)
    assert killed
    assert partial
    result = irq("quantize", large, out, *options)
    if not (out.exists() and result.code == 2):  # unless the last attempt had come through
        assert result.code == 0, result
    assert listing(out) == undisturbed
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("late", [False, True])
def test_interrupted(
    irq: Commands, large: Path, tmp_path: Path, number: int, code: int, late: bool
) -> None:
    with nothing_left(tmp_path):
        running = irq.start("quantize", large, tmp_path / "new" / "out", *ARGS)
        wait_for("new/out.partial/*.safetensors" if late else "new/out.partial", tmp_path)
        running.kill(number)
        result = running.wait()
    assert result.code == code, result
    assert "Traceback" not in result.err
    assert result.err.count("\n") <= 1


@pytest.mark.parametrize("options", [[], ["--json"], ["--dry-run"]], ids=str)
def test_nobody_reads_the_output(tmp_path: Path, options: list[str]) -> None:
    source = make_source(tmp_path / "source")
    process = subprocess.Popen(
        [sys.executable, "-m", "irq_convert", "quantize", source, tmp_path / "out", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(300) == 1
    assert errors == ""
    assert (tmp_path / "out" / "irq_manifest.json").exists() is (options != ["--dry-run"])
    assert not (tmp_path / "out.partial").exists()


def test_two_runs_at_once(irq: Commands, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    with output_folder(tmp_path / "out"), nothing_left(tmp_path):
        result = irq("quantize", source, tmp_path / "out")
    assert_fails(result, 2, "out.partial", f"process {os.getpid()}")
