"""The commands `inspect` and `verify` as a person runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from irq_convert.cli.main import main
from tests.folders import SHARD

from .helpers import DOWN0, flip


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program in this process, 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["irq-convert", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        code = stop.value.code
        return Done(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


def test_inspect_prints_a_table_of_80_columns(run: Run, pristine: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    done = run("inspect", pristine, "--by", "tensor", "--plot", plot)
    assert (done.returncode, done.stderr) == (0, "")
    table = [line for line in done.stdout.splitlines() if str(tmp_path) not in line]
    table = [line for line in table if not line.startswith("artifact")]
    assert max(map(len, table)) <= 80
    assert any(DOWN0.removesuffix(".weight") in line and "nf3" in line for line in table)
    assert plot.stat().st_size > 10_000


def test_inspect_by_layer_and_as_json(run: Run, pristine: Path) -> None:
    done = run("inspect", pristine)
    assert done.returncode == 0
    assert "model.layers.1" in done.stdout
    found = json.loads(run("inspect", pristine, "--json", "--by", "kind").stdout)
    assert [row["name"] for row in found["rows"]][-1] == "other"
    assert found["source"]["model"] == "tiny-llama"
    assert found["total"]["quantized_weights"] > 0


def test_inspect_refuses_a_dense_model_in_one_line(run: Run, source: Path) -> None:
    done = run("inspect", source)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "not an irq artifact" in done.stderr


def test_verify_prints_a_summary(run: Run, pristine: Path, source: Path) -> None:
    done = run("verify", pristine, "--against", source)
    assert (done.returncode, done.stderr) == (0, "")
    assert "whole" in done.stdout
    assert "relative error" in done.stdout


def test_verify_prints_each_failure_as_a_line(run: Run, artifact: Path, source: Path) -> None:
    flip(artifact, f"{DOWN0}_tau", 5)
    (artifact / "tokenizer.json").unlink()
    done = run("verify", artifact)
    assert (done.returncode, done.stderr) == (1, "")
    lines = sorted(done.stdout.splitlines())
    assert [line.split(":")[0] for line in lines] == [SHARD, "tokenizer.json"]
    report = json.loads(run("verify", artifact, "--against", source, "--json").stdout)
    assert report["ok"] is False
    assert any(line.startswith(f"{DOWN0}_tau") for line in report["failures"])


def test_a_revision_needs_a_source(run: Run, pristine: Path) -> None:
    done = run("verify", pristine, "--revision", "main")
    assert done.returncode == 2
    assert "--against" in done.stderr


@pytest.mark.slow
def test_a_real_process_exits_with_1(artifact: Path) -> None:
    flip(artifact, f"{DOWN0}_tau", 5)
    done = subprocess.run(
        [sys.executable, "-c", "from irq_convert.cli.main import main; main()", "verify", artifact],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(f"{SHARD}: changed")
