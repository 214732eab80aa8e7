"""Whole runs in this process: the three kinds, what is recorded, resume, divergence."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import irq_convert
from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.artifact.identity import artifact_identity
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.text import read_text
from irq_convert.jobs.finetune.data import load_data
from irq_convert.jobs.finetune.estimate import estimate_finetune
from irq_convert.jobs.finetune.finetune import finetune
from irq_convert.jobs.finetune.folder import STATE
from irq_convert.jobs.finetune.moves import round_statistics
from irq_convert.jobs.finetune.options import Connection
from irq_convert.jobs.finetune.progress import TrainingProgress
from irq_convert.jobs.finetune.report import FinetuneReport
from irq_convert.jobs.finetune.trainer import AdapterTrainer, write_errors
from tests.folders import change_json, listing

from .base import quick, write_tales

FILES = ["adapter_config.json", "adapter_model.safetensors", "irq_adapter.json"]


class Listener(TrainingProgress):
    """Remembers; `do` is called after each step."""

    def __init__(self, do: Any = None) -> None:
        self.steps: list[int] = []
        self.notes: list[str] = []
        self._do = do

    def step(self, step: int, loss: float) -> None:
        self.steps.append(step)
        if self._do:
            self._do(step)

    def note(self, text: str) -> None:
        self.notes.append(text)


def stop_at(wanted: int, number: int = signal.SIGINT) -> Listener:
    return Listener(lambda step: signal.raise_signal(number) if step == wanted else None)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("lora", list(AdapterKind))
def test_each_kind_trains_and_is_whole(
    artifact: Path, tales: Path, tokenizer: Any, tmp_path: Path, lora: AdapterKind
) -> None:
    out = tmp_path / "out"
    report = finetune(artifact, tales, out, quick(lora))
    assert report.end == "finished"
    assert report.before is not None
    assert report.after is not None
    assert report.after.mean < report.before.mean
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith("loss")) == FILES
    config = json.loads((out / FILES[0]).read_text())
    assert config["peft_type"] == ("LORA" if lora == AdapterKind.PLAIN else "IEC_LORA")
    assert config["base_model_name_or_path"] == str(artifact)
    keys = {key.rpartition(".")[2] for key in weights(out)}
    assert keys == ({"weight", "lora_iec_beta"} if lora.connected else {"weight"})
    # What was measured is what the saved adapter gives, loaded by PEFT alone.
    model = PeftModel.from_pretrained(irq_convert.load(artifact, dtype=torch.float32), str(out))
    if report.recipe.rounded_steps:  # measured as a merge stores it
        round_statistics(model)
    held = load_data(tales, None, tokenizer, length=48, holdout=0.05, vocabulary=None).heldout
    assert held is not None
    total = 0.0
    for example in held.examples:
        with torch.no_grad():
            loss = model.eval()(input_ids=example.ids[None], labels=example.labels[None]).loss
        total += float(loss) * example.learned
    assert report.after.mean == pytest.approx(total / held.learned, rel=1e-5)


def test_what_is_recorded(artifact: Path, tales: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = finetune(str(artifact), tales, out, quick(AdapterKind.PLAIN))
    note = json.loads((out / "irq_adapter.json").read_text())
    manifest = json.loads((artifact / "irq_manifest.json").read_text())
    assert (note["format"], note["format_version"], note["lora"]) == ("irq-adapter", 1, "plain")
    assert note["base"] == {
        "sha256": artifact_identity(artifact),
        "model": "demo-nf3",
        "source": manifest["source"],
    }
    training = note["training"]
    assert training["recipe"]["learning_rate"] == 1e-3
    assert training["data"]["file"]["name"] == "tales.txt"
    assert training["losses"]["heldout_after"]["value"] == pytest.approx(report.after.mean)  # type: ignore[union-attr]
    assert str(tmp_path) not in (out / "irq_adapter.json").read_text()
    with (out / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(n) for n in range(7)]
    assert [bool(row["heldout_loss"]) for row in rows] == [n in (0, 3, 6) for n in range(7)]
    assert (out / "loss.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "trained"),
    [
        (quick(steps=1), None),
        (quick(AdapterKind.BLOCK, steps=1), None),
        (
            quick(connection=Connection.NONE, steps=1, target_modules=("q_proj", "down_proj")),
            {"q_proj", "down_proj"},
        ),
    ],
)
def test_the_dry_run_counts_what_is_trained(
    artifact: Path, tales: Path, tmp_path: Path, options: Any, trained: set[str] | None
) -> None:
    found = estimate_finetune(artifact, tales, options)
    assert not list(tmp_path.iterdir())
    report = finetune(artifact, tales, tmp_path / "out", options)
    assert found.trainable == report.trainable
    assert found.trainable == sum(tensor.numel() for tensor in weights(tmp_path / "out").values())
    modules = {key.split(".lora_")[0].rpartition(".")[2] for key in weights(tmp_path / "out")}
    assert trained is None or modules == trained
    assert "lm_head" not in modules
    assert found.memory.total > 0


@pytest.fixture(scope="module")
def undisturbed(
    artifact: Path, tales: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FinetuneReport]:
    """Seven steps without an interruption."""
    whole = tmp_path_factory.mktemp("undisturbed") / "whole"
    return whole, finetune(artifact, tales, whole, quick(steps=7))


@pytest.mark.slow
@pytest.mark.parametrize(("at", "number"), [(1, signal.SIGINT), (4, signal.SIGTERM)])
def test_an_interrupted_run_ends_like_one_that_was_not(
    artifact: Path, tales: Path, undisturbed: tuple[Path, FinetuneReport], tmp_path: Path,
    at: int, number: int,
) -> None:  # fmt: skip
    options = quick(steps=7)
    (whole, report), parts = undisturbed, tmp_path / "parts"
    steps = report.recipe.steps
    stopped = finetune(artifact, tales, parts, options, progress=stop_at(at, number))
    assert (stopped.end, stopped.signal, stopped.step) == ("interrupted", number, at + 1)
    assert sorted([*FILES, STATE]) == sorted(
        path.name for path in parts.iterdir() if not path.name.startswith("loss")
    )
    early = weights(parts)
    listener = Listener()
    resumed = finetune(artifact, tales, parts, options, resume="required", progress=listener)
    assert resumed.resumed_from == at + 1
    assert listener.steps == list(range(at + 2, steps + 1))
    assert not (parts / STATE).exists()
    found, expected = weights(parts), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(early[name], expected[name]) for name in expected)
    assert resumed.after == report.after
    assert [(p.step, p.loss) for p in resumed.curve] == [(p.step, p.loss) for p in report.curve]


@pytest.mark.slow
def test_a_second_epoch_is_resumed_where_it_stood(artifact: Path, tmp_path: Path) -> None:
    few = write_tales(tmp_path / "few.txt", 1)
    options = quick(epochs=2.0, steps=None, holdout=0.0)
    report = finetune(artifact, few, tmp_path / "whole", options)
    assert report.recipe.steps % 2 == 0
    for at in (report.recipe.steps // 2 - 1, report.recipe.steps // 2):  # its border, and inside
        parts = tmp_path / f"parts-{at}"
        finetune(artifact, few, parts, options, progress=stop_at(at))
        finetune(artifact, few, parts, options)
        found, expected = weights(parts), weights(tmp_path / "whole")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_intervals_asked_for_when_it_goes_on_count(
    artifact: Path, tales: Path, tmp_path: Path
) -> None:
    finetune(artifact, tales, tmp_path, quick(eval_every=6, save_every=500), progress=stop_at(1))
    seen: list[set[str]] = []
    look = Listener(lambda step: seen.append({p.name for p in (tmp_path / STATE).glob("check*")}))
    report = finetune(artifact, tales, tmp_path, quick(eval_every=2, save_every=1), progress=look)
    assert [p.step for p in report.curve if p.heldout_loss is not None] == [0, 4, 6]
    assert {"checkpoint-3"} in seen


def test_nothing_there_to_resume(artifact: Path, tales: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to resume"):
        finetune(artifact, tales, tmp_path / "out", quick(steps=1), resume="required")
    assert not (tmp_path / "out").exists()


def test_divergence_keeps_the_last_good_adapter(
    artifact: Path, tales: Path, tmp_path: Path
) -> None:
    """The first step is taken from where LoRA begins, so that its loss is the base's."""
    out = tmp_path / "out"
    says = r"at step 2 of 6: lower --learning-rate .*holds an untrained adapter"
    with pytest.raises(IrqError, match=says):
        finetune(artifact, tales, out, quick(learning_rate=1e30, eval_every=6))
    found = weights(out)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert all(not bool(t.any()) for name, t in found.items() if "lora_B" in name)
    note = json.loads((out / "irq_adapter.json").read_text())["training"]
    assert (note["end"], note["step"]) == ("diverged", 0)
    assert not (out / STATE).exists()


@pytest.mark.slow
def test_one_that_breaks_leaves_an_older_adapter(
    artifact: Path, tales: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finetune(artifact, tales, out, quick(steps=1))
    before = listing(out)
    with pytest.raises(IrqError, match="out still holds the older adapter"):
        finetune(artifact, tales, out, quick(learning_rate=1e30), overwrite=True)
    assert listing(out) == before
    (out / "irq_adapter.json").write_text("damaged")
    finetune(artifact, tales, out, quick(steps=1), overwrite=True)
    assert listing(out).keys() == before.keys()


@pytest.mark.slow
def test_one_that_breaks_when_it_is_continued(
    artifact: Path, tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    finetune(artifact, tales, out, quick(), progress=stop_at(2))
    before = weights(out)
    step = json.loads((out / "irq_adapter.json").read_text())["training"]["step"]
    own = AdapterTrainer.training_step

    def broken(self: AdapterTrainer, *given: Any) -> torch.Tensor:
        loss = own(self, *given)
        self.loss_seen = self.loss_seen * torch.nan
        return loss

    monkeypatch.setattr(AdapterTrainer, "training_step", broken)
    says = f"at step {step + 1} of 6: .* holds the adapter of step {step}, the last good one"
    with pytest.raises(IrqError, match=says):
        finetune(artifact, tales, out, quick())
    after = weights(out)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_other_tokens_are_another_run(artifact: Path, tales: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetune(artifact, tales, out, quick(), progress=stop_at(2))
    change_json(out / STATE / "run.json", lambda raw: raw.update(tokens="of another tokenizer"))
    with pytest.raises(UsageError, match="the tokenizer makes other tokens of the data"):
        finetune(artifact, tales, out, quick())


def test_the_last_good_adapter_is_the_one_before_the_step_that_broke(
    artifact: Path, tales: Path, tmp_path: Path
) -> None:
    """Warm-up: step 1 is taken at rate 0, step 2 at the full one, step 3's loss breaks."""
    options = quick(learning_rate=1e30, warmup=1, eval_every=6)
    with pytest.raises(IrqError, match=r"at step 3 of 6.*of step 1, the last good one"):
        finetune(artifact, tales, tmp_path / "out", options)
    rows = list(csv.DictReader((tmp_path / "out" / "loss.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1", "2"]


def test_a_model_that_is_broken_from_the_start(
    artifact: Path, tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from irq_convert.jobs.finetune import training_run as run

    load = run.load_base

    def broken(*args: Any) -> Any:
        model = load(*args)
        model.model.norm.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(run, "load_base", broken)
    with pytest.raises(IrqError, match="before any training: try --dtype float32"):
        finetune(artifact, tales, tmp_path / "out", quick())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(
    artifact: Path, tales: Path, tmp_path: Path
) -> None:
    for name, checkpointing in (("a", False), ("b", True)):
        finetune(
            artifact, tales, tmp_path / name, quick(gradient_checkpointing=checkpointing, steps=3)
        )
    found, expected = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in expected)


@pytest.mark.slow
def test_bfloat16_trains_float32_parameters(artifact: Path, tales: Path, tmp_path: Path) -> None:
    from irq_convert.jobs.finetune.options import TrainDtype

    report = finetune(artifact, tales, tmp_path / "out", quick(dtype=TrainDtype.BFLOAT16, steps=3))
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}
    assert report.before is not None
    assert report.after is not None
    assert report.after.mean < report.before.mean


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(IrqError, match=f"{tmp_path}: cannot be written"), write_errors(tmp_path):
        save_file({"a": torch.zeros(1)}, tmp_path)


def test_nothing_held_out(artifact: Path, tales: Path, tmp_path: Path) -> None:
    report = finetune(artifact, tales, tmp_path / "out", quick(holdout=0.0, steps=2))
    assert (report.before, report.after) == (None, None)
    assert report.data.train.tokens >= len(read_text(tales)) // 10
    losses = json.loads((tmp_path / "out" / "irq_adapter.json").read_text())["training"]["losses"]
    assert losses["heldout_before"] is None
    assert losses["last_training"] > 0
