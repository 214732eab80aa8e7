"""Two processes under torchrun train what one process does, and one of them writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from irq_convert.errors import UsageError
from irq_convert.jobs.finetune.finetune import finetune

from .base import quick

pytestmark = pytest.mark.slow

ARGS: list[object] = ["--batch-size", 8, "--micro-batch", 2, "--sequence-length", 48, "--rank", 4]
ARGS += ["--dropout", 0, "--save-every", 2, "--device", "cpu", "--eval-every", 3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(processes: int, *args: object, steps: int | None = 6) -> subprocess.Popen[str]:
    length = [] if steps is None else ["--steps", steps]
    many = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return subprocess.Popen(
        [sys.executable, *(many if processes > 1 else []), "-m", "irq_convert", "finetune"]
        + [str(arg) for arg in (*args, *ARGS, *length)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(processes: int, *args: object, steps: int | None = 6) -> tuple[int, str, str]:
    process = start(processes, *args, steps=steps)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_two_processes_train_as_one_does(artifact: Path, tales: Path, tmp_path: Path) -> None:
    code, printed, err = run(2, artifact, "--data", tales, "--out", tmp_path / "two", "--json")
    assert code == 0, err
    assert "Warning" not in err
    report = json.loads(printed)  # one report, not two
    options = quick(batch_size=8, dropout=0.0, learning_rate=None, rank=4)
    alone = finetune(artifact, tales, tmp_path / "one", options)
    assert report["recipe"]["processes"] == 2
    found, expected = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("two", "one")
    )
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-6), name
    assert alone.after is not None
    after = report["losses"]["heldout_after"]["value"]
    assert after == pytest.approx(alone.after.mean, rel=1e-5)
    assert not (tmp_path / "two" / ".training").exists()


def test_an_interrupted_pair_saves(artifact: Path, tales: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = (artifact, "--data", tales, "--out", out, "--epochs", 1000)
    process = start(2, *args, steps=None)
    end = time.monotonic() + 240
    while not list(out.glob(".training/checkpoint-*")):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert err.count("holds the adapter so far: the same command continues there") == 1
    assert (out / "adapter_config.json").exists()
    assert len(list(out.glob(".training/checkpoint-*"))) == 1
    settings = {"batch_size": 8, "dropout": 0.0, "learning_rate": None, "rank": 4}
    with pytest.raises(UsageError, match="the number of processes was 2 and is 1 now"):
        finetune(artifact, tales, out, quick(**settings, steps=None, epochs=1000))


def test_an_error_is_said_once(artifact: Path, tmp_path: Path) -> None:
    code, printed, err = run(2, artifact, "--data", tmp_path / "none.txt", "--out", tmp_path / "o")
    assert code != 0
    assert printed == ""
    assert err.count("no such text file") == 1
    assert not (tmp_path / "o").exists()
