"""Runs that do not come to their end: killed, interrupted, stopped, with nobody reading."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from irq_convert.checkpoint.disk import output_folder
from tests.folders import listing

from .process import Commands, assert_fails, nothing_left
from .sources import make_source
from .stopping import stop_at

pytestmark = pytest.mark.slow

ARGS = ("--objective", "mse", "--block-size", 16, "--max-shard-size", "1e-4", "--threads", 1)
SHARDS = 6


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes long enough to be stopped between two shards."""
    return make_source(tmp_path_factory.mktemp("large") / "source", rows=6_000)


@pytest.fixture(scope="module")
def undisturbed(irq: Commands, large: Path) -> dict[str, object]:
    out = large.parent / "out"
    assert irq("quantize", large, out, *ARGS).code == 0
    assert len(list(out.glob("*.safetensors"))) == SHARDS
    return listing(out)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment(
    irq: Commands, large: Path, undisturbed: dict[str, object], tmp_path: Path, overwrite: bool
) -> None:
    out = tmp_path / "out"
    options = [*ARGS, "--overwrite"] if overwrite else list(ARGS)

    def reset() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            assert irq("quantize", large, out, "--bits", 2, *ARGS).code == 0

    reset()
    old = listing(out)
    killed = stop_at(
        lambda: irq.start("quantize", large, out, *options),
        lambda: list(tmp_path.glob("out.partial/records/model*.record")),
        reset,
        whole=lambda: listing(out) == undisturbed,
    )
    chance = random.Random(1)
    for _ in range(5):
        if out.exists() and listing(out) == undisturbed:  # it was quicker, or killed at its end
            break
        assert killed.code == -signal.SIGKILL
        assert listing(out) == old or not out.exists()  # the old one is aside for a moment
        whole = [p for p in tmp_path.rglob("*") if p.suffix == ".safetensors"]
        assert all("out.partial" in p.parts or out in p.parents for p in whole)
        running = irq.start("quantize", large, out, *options)
        time.sleep(chance.uniform(0, 0.5))
        running.kill(signal.SIGKILL)
        killed = running.wait()
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
    irq: Commands,
    large: Path,
    undisturbed: dict[str, object],
    tmp_path: Path,
    number: int,
    code: int,
    late: bool,
) -> None:
    """What is finished is kept, and the only line says so; before that nothing is left."""
    out, partial = tmp_path / "new" / "out", tmp_path / "new" / "out.partial"
    ready = "out.partial/records/model*.record" if late else "out.partial"
    result = stop_at(
        lambda: irq.start("quantize", large, out, *ARGS),
        lambda: list(out.parent.glob(ready)),
        lambda: shutil.rmtree(tmp_path / "new"),
        number,
        out.exists,
    )
    assert result.code == code, result
    assert "Traceback" not in result.err
    count = len(list(partial.glob("records/model*.record")))
    if not count:
        assert not late
        assert result.err == ""
        assert not list(tmp_path.iterdir())
        return
    assert result.err == (
        f"irq-convert: stopped; {count} of {SHARDS} shards are finished and kept in {partial}: the "
        "same command continues there\n"
    )
    assert not list(partial.rglob(".*.tmp-*"))
    again = irq("quantize", large, out, *ARGS)
    assert again.code == 0
    line = f"irq-convert: continuing {partial}: {count} of {SHARDS} shards are finished\n"
    assert again.err == line
    assert listing(out) == undisturbed
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_interrupted_where_nothing_is_to_be_kept(
    irq: Commands, large: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "new" / "out", tmp_path / "new" / "out.partial"
    result = stop_at(
        lambda: irq.start("quantize", large, out, *ARGS, "--resume", "never"),
        lambda: list(partial.glob("records/model*.record")),
        lambda: shutil.rmtree(tmp_path / "new"),
        signal.SIGTERM,
        out.exists,
    )
    assert (result.code, result.err) == (143, "")
    assert not list(tmp_path.iterdir())


def test_what_the_command_says_of_an_earlier_run(
    irq: Commands, large: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    assert_fails(irq("quantize", large, out, *ARGS, "--resume", "required"), 2, "nothing to resume")
    assert not partial.exists()
    stop_at(
        lambda: irq.start("quantize", large, out, *ARGS),
        lambda: list(partial.glob("records/model*.record")),
        lambda: shutil.rmtree(out),
        whole=out.exists,
    )
    count = len(list(partial.glob("records/model*.record")))
    with nothing_left(tmp_path):
        dry = irq("quantize", large, out, *ARGS, "--dry-run")
        found = json.loads(irq("quantize", large, out, *ARGS, "--dry-run", "--json").out)
        refused = irq("quantize", large, out, *ARGS, "--bits", 3, "--dry-run")
    assert f"would resume     {count} of {SHARDS} shards are there" in dry.out
    assert found["finished"] == count
    assert_fails(refused, 2, "codebook was nf4 and is nf3 now", "--resume never")
    assert_fails(irq("quantize", large, out, *ARGS, "--bits", 3), 2, "is nf3 now")
    done = irq("quantize", large, out, *ARGS, "--bits", 3, "--resume", "never")
    assert (done.code, done.err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("options", [[], ["--json"], ["--dry-run"]], ids=str)
def test_nobody_reads_the_output(irq: Commands, tmp_path: Path, options: list[str]) -> None:
    source = make_source(tmp_path / "source")
    result = irq.start("quantize", source, tmp_path / "out", *options, unread=True).wait()
    assert (result.code, result.err) == (1, "")
    assert (tmp_path / "out" / "irq_manifest.json").exists() is (options != ["--dry-run"])
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_nobody_reads_to_the_end_of_the_interpreter(tmp_path: Path) -> None:
    """Which writes what is left in its buffers."""
    source = make_source(tmp_path / "source")
    process = subprocess.Popen(
        [sys.executable, "-m", "irq_convert", "quantize", source, tmp_path / "out"],
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
    assert (tmp_path / "out" / "irq_manifest.json").exists()


def test_two_runs_at_once(irq: Commands, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    with output_folder(tmp_path / "out"), nothing_left(tmp_path):
        result = irq("quantize", source, tmp_path / "out")
    assert_fails(result, 2, "out.partial", f"process {os.getpid()}")
