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
from tests.cli.process import Commands, Result, assert_fails

from .base import quick

pytestmark = pytest.mark.slow

ARGS: list[object] = ["--batch-size", 8, "--micro-batch", 2, "--sequence-length", 48, "--rank", 4]
ARGS += ["--dropout", 0, "--save-every", 2, "--device", "cpu", "--eval-every", 3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def together(irq: Commands, *args: object) -> Result:
    """Two processes as torchrun would start them."""
    return irq.together(2, "finetune", *ARGS, "--steps", 6, *args)


def torchrun(*args: object) -> subprocess.Popen[str]:
    many = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.Popen(
        [sys.executable, *many, "-m", "irq_convert", "finetune", *map(str, (*args, *ARGS))],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_train_as_one_does(
    irq: Commands, artifact: Path, tales: Path, tmp_path: Path
) -> None:
    done = together(irq, artifact, "--data", tales, "--out", tmp_path / "two", "--json")
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)  # one report, not two
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
    process = torchrun(*args)
    end = time.monotonic() + 240
    while not list(out.glob(".training/checkpoint-*")):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "Warning" not in err
    assert err.count("holds the adapter so far: the same command continues there") == 1
    assert (out / "adapter_config.json").exists()
    assert len(list(out.glob(".training/checkpoint-*"))) == 1
    settings = {"batch_size": 8, "dropout": 0.0, "learning_rate": None, "rank": 4}
    with pytest.raises(UsageError, match="the number of processes was 2 and is 1 now"):
        finetune(artifact, tales, out, quick(**settings, steps=None, epochs=1000))


def test_an_error_is_said_once(irq: Commands, artifact: Path, tmp_path: Path) -> None:
    done = together(irq, artifact, "--data", tmp_path / "none.txt", "--out", tmp_path / "o")
    assert_fails(done, 2, "no such text file")
    assert not (tmp_path / "o").exists()
