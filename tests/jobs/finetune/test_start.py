"""Runs whose adapters start at what quantizing has lost, through the job."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import irq_convert
from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.errors import UsageError
from irq_convert.jobs.common.torchrun import FailedElsewhere
from irq_convert.jobs.finetune import start as room
from irq_convert.jobs.finetune.estimate import estimate_finetune
from irq_convert.jobs.finetune.finetune import finetune
from irq_convert.jobs.finetune.keeping import withdraw_unless_lower
from irq_convert.jobs.finetune.loss import Loss
from irq_convert.jobs.finetune.options import FinetuneOptions
from irq_convert.jobs.finetune.progress import TrainingProgress
from irq_convert.jobs.finetune.start import example_windows
from irq_convert.jobs.measure.measure import measure
from tests.folders import change_json
from tests.paths import DEMO

from .base import quick
from .teaching import taught
from .test_job import Listener, stop_at


def started(**changes: Any) -> FinetuneOptions:
    """A rate that moves nothing, so that what comes out is the start; measured by KL."""
    rate = {"learning_rate": 1e-12, "rank": 16, "teacher": str(DEMO)}
    given = {"init": "error", **rate, **changes}
    return quick(given.pop("lora", AdapterKind.PLAIN), **given)


@pytest.fixture(scope="module")
def run(int2: Path, tales: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("run") / "out"
    return out, finetune(int2, tales, out, started(steps=3))


@pytest.mark.slow
def test_the_loss_falls_before_any_training(
    run: tuple[Path, Any], int2: Path, tales: Path, tmp_path: Path
) -> None:
    """And "before" is the artifact's, not that of the started adapter."""
    out, report = run
    plain = finetune(int2, tales, tmp_path / "plain", taught(AdapterKind.PLAIN, steps=1))
    assert report.before == plain.before
    assert report.start is not None
    assert report.start.mean == pytest.approx(report.after.mean, rel=1e-3)
    assert report.curve[0].heldout_loss == report.start.mean
    assert report.training()["losses"]["heldout_start"]["value"] == report.start.mean
    assert report.after.mean < 0.6 * report.before.mean
    assert report.recipe.init_sha256
    model = PeftModel.from_pretrained(irq_convert.load(int2, dtype=torch.float32), str(out))
    base = irq_convert.load(int2, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_a_start_that_training_makes_worse_is_not_kept(run: tuple[Path, Any]) -> None:
    _, report = run
    start = report.start
    worse = Loss(tuple(1.01 * each for each in start.sums), start.counts)
    assert worse.mean < report.before.mean
    withdraw_unless_lower(dataclasses.replace(report, after=start), None, TrainingProgress())
    with pytest.raises(FailedElsewhere):
        withdraw_unless_lower(dataclasses.replace(report, after=worse), None, TrainingProgress())


@pytest.mark.slow
def test_a_continued_run_keeps_its_start(
    run: tuple[Path, Any], int2: Path, tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = run
    parts = tmp_path / "parts"
    options = started(steps=3, save_every=1)
    finetune(int2, tales, parts, options, progress=stop_at(1))
    with pytest.raises(UsageError, match="--init was 'error' and is 'default' now"):
        finetune(int2, tales, parts, dataclasses.replace(options, init="default"))

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("started again")

    monkeypatch.setattr(room, "start_from_error", never)
    finetune(int2, tales, parts, options)
    one, other = (load_file(each / "adapter_model.safetensors") for each in (out, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_teacher_of_other_shapes_starts_nothing(int2: Path, tales: Path, tmp_path: Path) -> None:
    """It teaches all the same; who asks for the start is told before the teacher has run."""
    other = shutil.copytree(DEMO, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    for name, weight in weights.items():
        if ".mlp.gate" in name or ".mlp.up" in name:
            weights[name] = weight[: len(weight) // 2].clone()
        elif ".mlp.down" in name:
            weights[name] = weight[:, : weight.shape[1] // 2].clone()
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    change_json(
        other / "config.json",
        lambda raw: raw.update(intermediate_size=raw["intermediate_size"] // 2),
    )
    listener = Listener()
    report = finetune(
        int2, tales, tmp_path / "out", taught(teacher=str(other), steps=1, holdout=0.0),
        progress=listener,
    )  # fmt: skip
    assert report.recipe.init == "default"
    assert report.start is None
    assert any(
        "start at no change, as the artifact is of another model" in n for n in listener.notes
    )
    with pytest.raises(UsageError, match="give the source that the artifact was made from"):
        estimate_finetune(int2, tales, taught(teacher=str(other), init="error"))


@pytest.mark.slow
def test_by_importance(int2: Path, tales: Path, run: tuple[Path, Any], tmp_path: Path) -> None:
    file = tmp_path / "importance.safetensors"
    measure(str(DEMO), file, text=str(tales), tokens=1024, window=64)
    report = finetune(int2, tales, tmp_path / "out", started(steps=1, importance=file))
    assert report.before is not None
    assert report.after is not None
    assert report.after.mean < 0.8 * report.before.mean
    assert report.recipe.init_sha256 != run[1].recipe.init_sha256


def test_windows_are_those_of_the_examples(tales: Path) -> None:
    class Some:
        def __init__(self, ids: list[int]) -> None:
            self.ids = torch.tensor(ids)

    windows = example_windows([Some([1, 2, 3]), Some([4, 5]), Some([6, 7])], "rows")  # type: ignore[list-item]
    assert windows.ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert windows.held_out == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init": "error"}, "add --source"),
        ({"init": "error", "lora": "statistics", "source": "m"}, "has no matrices to start"),
        ({"source": "m"}, "--source: of no use without --init error"),
        ({"importance": "f"}, "--importance: of no use without --init error"),
    ],
)
def test_contradictions(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        FinetuneOptions(**options)


def test_a_source_of_another_shape(int2: Path, tales: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give the source that the artifact was made from"):
        finetune(int2, tales, tmp_path / "out", started(source=str(int2), teacher=None))
    assert not (tmp_path / "out").exists()
