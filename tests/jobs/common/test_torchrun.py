"""Several processes under torchrun make what one makes, byte for byte, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from irq_convert.core.spec import QuantSpec
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.cli.process import ENVIRONMENT, Commands, assert_fails
from tests.cli.sources import make_source
from tests.folders import listing
from tests.jobs.merge.make import write_adapter

pytestmark = pytest.mark.slow
OPTIONS = QuantizeOptions(QuantSpec("nf4", 16, "mse", refine=30), max_shard_bytes=50_000, threads=1)
ARGS: tuple[object, ...] = ("--objective", "mse", "--block-size", 16, "--refine", 30)
ARGS += ("--max-shard-size", "5e-5")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("ranks") / "source", shards=3, rows=3000)


@pytest.fixture(scope="module")
def alone(source: Path) -> dict[str, object]:
    """What one process makes."""
    out = source.parent / "alone"
    quantize(str(source), out, OPTIONS)
    return listing(out)


def start(processes: int, *args: object) -> subprocess.Popen[str]:
    many = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return subprocess.Popen(
        [sys.executable, *many, "-m", "irq_convert", *map(str, args)],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout, and what is ours of stderr: torchrun has its own account of failures."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, "\n".join(n for n in err.splitlines() if "irq-convert:" in n)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started, by rank."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    return sorted(map(int, found.stdout.split()))


def wait_for(process: subprocess.Popen[str], ready: Callable[[], object]) -> bool:
    """Wait until `ready()`; False when the run is over before."""
    end = time.monotonic() + 120
    while not ready():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end
        time.sleep(0.005)
    return True


def test_three_processes(
    irq: Commands, source: Path, alone: dict[str, object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = irq.together(3, "quantize", source, out, *ARGS)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("relative error") == 1
    assert listing(out) == alone
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_processes_are_killed_and_other_numbers_go_on(
    irq: Commands, source: Path, alone: dict[str, object], tmp_path: Path
) -> None:
    """The last of two, then the first: the other one ends, and three processes finish it."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    records = lambda: len(list(partial.glob("records/model*")))  # noqa: E731
    kept = 0
    for victim in (1, 0):
        running = start(2, "quantize", source, out, *ARGS)
        if not wait_for(running, lambda: records() > kept):  # noqa: B023
            finish(running)
            pytest.skip("this machine is faster than a signal")
        os.kill(workers(running)[victim], signal.SIGKILL)
        code, printed, err = finish(running)
        if code == 0:
            pytest.skip("this machine is faster than a signal")
        assert printed == ""
        assert not out.exists()
        lines = err.splitlines()
        if kept:
            assert f"continuing {partial}: {kept} of {len(shards(alone))}" in lines.pop(0)
        kept = records()
        if victim:  # the first process lives and says it
            (line,) = lines
            assert f"{kept} of {len(shards(alone))} shards are finished and kept in" in line
        else:
            assert len(lines) <= 1
    done = irq.together(3, "quantize", source, out, *ARGS, "--resume", "required")
    assert done.code == 0, done
    assert listing(out) == alone
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def shards(found: dict[str, object]) -> list[str]:
    return [name for name in found if name.endswith(".safetensors")]


def test_an_error_is_said_once_and_all_end(irq: Commands, tmp_path: Path) -> None:
    done = irq.together(2, "quantize", tmp_path / "none", tmp_path / "out")
    assert_fails(done, 2, f"irq-convert: {tmp_path / 'none'}: no such folder\n")
    assert not list(tmp_path.iterdir())


def test_merge(irq: Commands, tiny_nf4: Path, tmp_path: Path) -> None:
    base, adapter = tiny_nf4, write_adapter(tmp_path / "adapter", tiny_nf4)
    options = MergeOptions(
        to=MergeTo.IRQ, check=Check.LAYERS, min_survival=-9.0, threads=1, max_shard_bytes=20_000
    )
    one = merge(base, adapter, tmp_path / "one", options)
    args = ("--to", "irq", "--check", "layers", "--max-shard-size", "2e-5", "--min-survival", -9)
    done = irq.together(2, "merge", base, adapter, tmp_path / "two", *args)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("result") == 1
    assert f"{one.survived:.4f} of what was learned" in done.out
    assert listing(tmp_path / "two") == listing(tmp_path / "one")
    assert len(shards(listing(tmp_path / "two"))) > 2
