"""Merges that do not come to their end: stopped, killed, two at once."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from merge.make import make_artifact, write_adapter

from irq_convert.artifact.verify import verify_artifact
from irq_convert.checkpoint.disk import output_folder

from .process import Commands, assert_fails, nothing_left


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "tiny-irq")


@pytest.fixture
def adapter(artifact: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", artifact)


def test_two_runs_at_once(irq: Commands, artifact: Path, adapter: Path, tmp_path: Path) -> None:
    with output_folder(tmp_path / "out"), nothing_left(tmp_path):
        result = irq("merge", artifact, adapter, tmp_path / "out", "--to", "dense")
    assert_fails(result, 2, "out.partial", f"process {os.getpid()}")


@pytest.mark.parametrize("number", [2, 15])
@pytest.mark.parametrize("to", ["dense", "irq"])
def test_interrupted(irq: Commands, tmp_path: Path, number: int, to: str) -> None:
    """Ctrl-C or SIGTERM while tensors are written leaves nothing at all."""
    base, adapter = _large(tmp_path)
    with nothing_left(tmp_path):
        running = irq.start("merge", base, adapter, tmp_path / "new" / "out", "--to", to, *_SLOW)
        _wait_for("new/out.partial/*.safetensors", tmp_path)
        running.kill(number)
        result = running.wait()
    assert result.code == {2: 130, 15: 143}[number], result
    assert "Traceback" not in result.err


@pytest.mark.parametrize("to", ["dense", "irq", "adapter"])
def test_killed(irq: Commands, tmp_path: Path, to: str) -> None:
    """SIGKILL at any moment: no result, and the next run succeeds over what was left."""
    base, adapter = _large(tmp_path)
    out = tmp_path / "out"
    for delay in (0.0, 0.05, 0.2):
        running = irq.start("merge", base, adapter, out, "--to", to, *_SLOW)
        _wait_for("out.partial", tmp_path)
        time.sleep(delay)
        running.kill()
        result = running.wait()
        assert result.code in (0, -9)
        if out.exists():  # it was faster, and so it is whole
            if to == "irq":
                assert verify_artifact(out).ok
            shutil.rmtree(out)
    result = irq("merge", base, adapter, out, "--to", to, *_SLOW)
    assert result.code == 0, result
    assert not (tmp_path / "out.partial").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["out", "large", "large-source", "adapter"]
    )


_SLOW = ("--check", "layers", "--threads", "1", "--max-shard-size", "1e-4", "--min-survival", "-9")


def _large(folder: Path) -> tuple[Path, Path]:
    """An artifact in many shards, so that there is a moment between two of them."""
    base = make_artifact(folder / "large")
    return base, write_adapter(folder / "adapter", base, rank=64)


def _wait_for(pattern: str, folder: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert time.monotonic() < end
        time.sleep(0.002)
