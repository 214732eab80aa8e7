"""Merges that do not come to their end: stopped, killed, two at once."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from irq_convert.artifact.verify import verify_artifact
from irq_convert.checkpoint.disk import output_folder
from tests.folders import listing
from tests.jobs.merge.make import write_adapter

from .process import Commands, assert_fails, nothing_left
from .stopping import await_moment, stop_at

pytestmark = pytest.mark.slow


@pytest.fixture
def artifact(tiny_nf4: Path) -> Path:
    return tiny_nf4


@pytest.fixture
def adapter(artifact: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", artifact)


def test_two_runs_at_once(irq: Commands, artifact: Path, adapter: Path, tmp_path: Path) -> None:
    with output_folder(tmp_path / "out"), nothing_left(tmp_path):
        result = irq("merge", artifact, adapter, tmp_path / "out", "--to", "dense")
    assert_fails(result, 2, "out.partial", f"process {os.getpid()}")


@pytest.mark.parametrize("number", [2, 15])
@pytest.mark.parametrize("to", ["dense", "irq"])
def test_interrupted(irq: Commands, artifact: Path, tmp_path: Path, number: int, to: str) -> None:
    """Ctrl-C or SIGTERM keeps the shards that are finished, and the next run continues."""
    adapter = write_adapter(tmp_path / "adapter", artifact, rank=64)
    new = tmp_path / "new"
    args = ("merge", artifact, adapter, new / "out", "--to", to, *_SLOW)
    assert irq(*args).code == 0
    expected = listing(new / "out")
    shutil.rmtree(new)
    result = stop_at(
        lambda: irq.start(*args),
        lambda: list(new.glob("out.partial/records/model*.record")),
        lambda: shutil.rmtree(new),
        number,
        (new / "out").exists,
    )
    assert result.code == {2: 130, 15: 143}[number], result
    assert "Traceback" not in result.err
    assert "shards are finished and kept in" in result.err
    assert result.err.count("\n") == 1
    assert [path.name for path in new.iterdir()] == ["out.partial"]
    refused = irq(*args, "--max-shard-size", "2e-4")
    assert_fails(refused, 2, "max shard bytes was 100000 and is 200000 now", "--resume never")
    again = irq(*args, "--resume", "required")
    assert again.code == 0, again
    assert "irq-convert: continuing" in again.err
    assert listing(new / "out") == expected
    assert [path.name for path in new.iterdir()] == ["out"]


@pytest.mark.parametrize("to", ["dense", "irq", "adapter"])
def test_killed(irq: Commands, artifact: Path, tmp_path: Path, to: str) -> None:
    """SIGKILL at any moment: no result, and the next run succeeds over what was left."""
    adapter = write_adapter(tmp_path / "adapter", artifact, rank=64)
    out = tmp_path / "out"
    for delay in (0.0, 0.05, 0.2):
        running = irq.start("merge", artifact, adapter, out, "--to", to, *_SLOW)
        await_moment(running, (tmp_path / "out.partial").exists)
        time.sleep(delay)
        running.kill()
        result = running.wait()
        assert result.code in (0, -9)
        if out.exists():  # it was faster, and so it is whole
            if to == "irq":
                assert verify_artifact(out).ok
            shutil.rmtree(out)
    result = irq("merge", artifact, adapter, out, "--to", to, *_SLOW)
    assert result.code == 0, result
    assert not (tmp_path / "out.partial").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "out"]


def test_a_refused_result_is_not_kept(
    irq: Commands, artifact: Path, adapter: Path, tmp_path: Path
) -> None:
    """All shards are finished then, and would be refused again."""
    args = ("--to", "irq", "--max-shard-size", "1e-4", "--min-survival", 1)
    with nothing_left(tmp_path):
        result = irq("merge", artifact, adapter, tmp_path / "out", *args)
    assert_fails(result, 1, "--min-survival 1")


def test_a_folded_adapter_has_nothing_to_resume(
    irq: Commands, artifact: Path, adapter: Path, tmp_path: Path
) -> None:
    args = ("merge", artifact, adapter, tmp_path / "out", "--to", "adapter", "--resume")
    with nothing_left(tmp_path):
        assert_fails(irq(*args, "required"), 2, "--resume required")


# In many shards, so that there is a moment between two of them.
_SLOW = ("--check", "layers", "--threads", "1", "--max-shard-size", "1e-4", "--min-survival", "-9")
