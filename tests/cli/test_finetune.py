"""`finetune` and `eval --adapter` as a user runs them."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.folders import listing
from tests.jobs.finetune.base import write_tales

from .process import Commands, assert_fails, fresh, nothing_left
from .stopping import stop_at

ARGS = ["--steps", 6, "--batch-size", 4, "--sequence-length", 48, "--rank", 4, "--save-every", 2]
ARGS += ["--device", "cpu", "--learning-rate", 1e-3]


@pytest.fixture(scope="module")
def artifact(demo_nf3: Path) -> Path:
    return demo_nf3


@pytest.fixture(scope="module")
def tales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tales(tmp_path_factory.mktemp("text") / "tales.txt")


@pytest.fixture(scope="module")
def adapter(
    irq: Commands, artifact: Path, tales: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("made") / "adapter"
    result = irq("finetune", artifact, "--data", tales, "--out", out, *ARGS)
    assert (result.code, result.err) == (0, "")
    for words in ("held-out loss", "6 steps", "iec, rank 4", "training loss"):
        assert words in result.out, words
    return out


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob(".training/checkpoint-*"))


def test_the_folder(adapter: Path) -> None:
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "irq_adapter.json",
        "loss.csv",
        "loss.png",
    ]
    modes = {path.stat().st_mode for path in adapter.iterdir()}
    assert len(modes) == 1


def test_a_dry_run_writes_nothing(
    irq: Commands, artifact: Path, tales: Path, tmp_path: Path
) -> None:
    args = ("finetune", artifact, "--data", tales, "--out", tmp_path / "out", "--dry-run")
    with nothing_left(tmp_path):
        result = irq(*args)
        report = json.loads(irq(*args, "--json").out)
    assert result.code == 0, result
    assert "10,000" in result.out
    assert f"{report['trainable_parameters']:,} parameters" in result.out
    assert report["memory_bytes"]["total"] > report["memory_bytes"]["adapter"]


@pytest.mark.slow
def test_eval_with_the_adapter(irq: Commands, artifact: Path, tales: Path, adapter: Path) -> None:
    args = ("eval", artifact, "--text", tales, "--context", 48, "--from-fraction", 0.95)
    plain = json.loads(irq(*args, "--json").out)
    result = irq(*args, "--adapter", adapter, "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert report["nll"] < plain["nll"]
    assert report["adapter"]["kind"] == "iec"
    assert report["adapter"]["base_matches"] is True
    assert plain["adapter"] is None
    table = irq(*args, "--adapter", adapter, "--against", artifact)
    assert f"adapter    {adapter} (iec)" in table.out
    assert "KL(reference || model)" in table.out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_resumed(
    irq: Commands, artifact: Path, tales: Path, adapter: Path, tmp_path: Path, number: int
) -> None:
    """At a moment that nobody chose, and still the adapter of an undisturbed run comes out."""
    out = tmp_path / "out"
    args = ["finetune", artifact, "--data", tales, "--out", out, *ARGS]
    stopped = stop_at(
        lambda: irq.start(*args),
        lambda: checkpoints(out),
        lambda: shutil.rmtree(out),
        number,
    )
    if number == signal.SIGKILL:
        assert stopped.code == -signal.SIGKILL
        assert not (out / "adapter_config.json").exists()
    else:
        assert stopped.code == 128 + number
        assert stopped.out == ""
        assert stopped.err.startswith("irq-convert: stopped at step ")
        assert stopped.err.count("\n") == 1
        early = load_file(out / "adapter_model.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in early.values())
        assert_fails(
            irq(*args, "--learning-rate", "0.5", "--rank", 8), 2,
            "--rank was 4 and is 8 now; --learning-rate was 0.001 and is 0.5 now",
        )  # fmt: skip
    resumed = irq(*args, "--resume", "required", "--eval-every", 5)
    assert resumed.code == 0, resumed
    found, expected = (load_file(f / "adapter_model.safetensors") for f in (out, adapter))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (out / ".training").exists()


def test_an_interruption_before_training_leaves_nothing(
    irq: Commands, artifact: Path, tales: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "out"
    with nothing_left(tmp_path):
        result = stop_at(
            lambda: irq.start("finetune", artifact, "--data", tales, "--out", out, *ARGS),
            lambda: (out / ".training" / "run.json").exists(),
            lambda: shutil.rmtree(tmp_path / "new"),
            signal.SIGINT,
        )
    assert result.code == 130, result
    assert "Traceback" not in result.err


def test_a_learning_rate_that_breaks(
    irq: Commands, artifact: Path, tales: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = irq(
        "finetune",
        artifact,
        "--data",
        tales,
        "--out",
        out,
        *ARGS,
        "--learning-rate",
        1e30,
        "--eval-every",
        6,
    )
    assert_fails(result, 1, "infinite at step 2 of 6", "--learning-rate", "an untrained adapter")
    kept = load_file(out / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())


@pytest.mark.slow
def test_overwrite(
    irq: Commands, artifact: Path, tales: Path, adapter: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(adapter, tmp_path / "out"))
    args = ["finetune", artifact, "--data", tales, "--out", out, *ARGS, "--steps", 1]
    before = listing(out)
    with nothing_left(tmp_path):
        assert_fails(irq(*args), 2, "not empty", "--overwrite")
        assert_fails(irq(*args, "--resume", "required"), 2, "nothing to resume")
    assert irq(*args, "--overwrite", "--holdout", 0).code == 0
    assert listing(out).keys() == before.keys()
    assert listing(out)["adapter_model.safetensors"] != before["adapter_model.safetensors"]


@pytest.mark.slow
def test_a_fresh_process_says_nothing_else(artifact: Path, tales: Path, tmp_path: Path) -> None:
    """No bars, notes or warnings of the libraries, even where warnings are not turned off."""
    out = tmp_path / "out"
    args = ("finetune", artifact, "--data", tales, "--out", out, *ARGS, "--json")
    result = fresh(*args, PYTHONWARNINGS="default")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert (report["end"], report["adapter"]) == ("finished", str(out))
    assert report["recipe"]["batch_size"] == 4
    before, after = (report["losses"][f"heldout_{when}"] for when in ("before", "after"))
    assert after["value"] < before["value"]
    change = report["losses"]["heldout_change"]["value"]
    assert change == pytest.approx(after["value"] - before["value"])
