"""Runs that train scale and tau: what they lower is what a merged artifact keeps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.evaluate.evaluate import evaluate
from irq_convert.jobs.finetune.estimate import estimate_finetune
from irq_convert.jobs.finetune.finetune import finetune
from irq_convert.jobs.finetune.options import FinetuneOptions, Schedule
from irq_convert.jobs.finetune.trainer import AdapterTrainer
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import MergeOptions, MergeTo
from tests.folders import read_tensors
from tests.paths import DEMO

from .teaching import taught
from .test_job import stop_at

ALONE = AdapterKind.STATISTICS


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logits") / "teacher.safetensors"


@pytest.fixture(scope="module")
def run(
    int2: Path, tales: Path, logits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("run") / "out"
    return out, finetune(int2, tales, out, moved(logits))


def moved(logits: Path, **changes: Any) -> FinetuneOptions:
    given = {"steps": 8, "learning_rate": 3e-3, "eval_every": 8, "teacher_logits": logits}
    return taught(ALONE, **given | changes)


@pytest.mark.slow
def test_what_is_lowered_is_what_the_merged_artifact_keeps(
    run: tuple[Path, Any], int2: Path, tales: Path, tmp_path: Path
) -> None:
    out, report = run
    assert report.after.mean < 0.97 * report.before.mean
    recipe = json.loads((out / "irq_adapter.json").read_text())["training"]["recipe"]
    assert (recipe["rank"], recipe["statistics"], recipe["schedule"]) == (0, "both", "cosine")
    assert (recipe["statistics_rate"], recipe["rounded_steps"]) == (3e-3, 2)
    merge(int2, out, tmp_path / "merged", MergeOptions(to=MergeTo.IRQ))
    before, after = read_tensors(int2), read_tensors(tmp_path / "merged")
    codes = [name for name in before if f"{name}_scale" in before]
    assert codes
    for name in codes:
        assert torch.equal(before[name], after[name])
        assert after[f"{name}_scale"].dtype == after[f"{name}_tau"].dtype == torch.uint8
    text = tmp_path / "tales.txt"
    text.write_text(tales.read_text()[:3000])
    kls = [
        evaluate(folder, text, against=DEMO, context=48).kl
        for folder in (int2, tmp_path / "merged")
    ]
    assert kls[1] < 0.97 * kls[0]


@pytest.mark.slow
def test_the_merged_artifact_has_the_measured_kl(
    run: tuple[Path, Any], int2: Path, tales: Path, logits: Path, tmp_path: Path
) -> None:
    """A further run on it measures, before any step, what the first one ended with."""
    out, report = run
    merge(int2, out, tmp_path / "merged", MergeOptions(to=MergeTo.IRQ))
    again = finetune(tmp_path / "merged", tales, tmp_path / "again", moved(logits, steps=2))
    assert again.before is not None
    assert again.before.mean == pytest.approx(report.after.mean, rel=1e-4)


@pytest.mark.slow
def test_stopped_and_continued_it_is_the_same(
    run: tuple[Path, Any], int2: Path, tales: Path, logits: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    finetune(int2, tales, parts, moved(logits), progress=stop_at(6))  # while it rounds
    with pytest.raises(UsageError, match="--statistics was 'both' and is 'tau' now"):
        finetune(int2, tales, parts, dataclasses.replace(moved(logits), statistics="tau"))
    resumed = finetune(int2, tales, parts, moved(logits), resume="required")
    out, report = run
    assert 6 <= resumed.resumed_from < 8
    for name in ("adapter_model.safetensors", "adapter_config.json", "loss.csv"):
        assert (parts / name).read_bytes() == (out / name).read_bytes(), name
    assert resumed.after == report.after


def test_beside_matrices_they_and_betas_have_rates_of_their_own(
    int2: Path, tales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[Any] = []
    made = AdapterTrainer.create_optimizer

    def seen(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        optimizer = made(self, *args, **kwargs)
        groups.extend((g["lr"], len(g["params"])) for g in optimizer.param_groups)
        return optimizer

    monkeypatch.setattr(AdapterTrainer, "create_optimizer", seen)
    options = taught(AdapterKind.IEC, teacher=None, statistics="both", beta_rate=5e-2, steps=2)
    report = finetune(int2, tales, tmp_path / "out", options)
    assert report.recipe.rounded_steps == 0  # a merge quantizes again, or makes it dense
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    moves = [name for name in tensors if "lora_irq" in name]
    betas = [name for name in tensors if "lora_iec_beta" in name]
    assert groups[-2:] == [(3e-3, len(moves)), (5e-2, len(betas))]
    left = len(tensors) - len(moves) - len(betas)
    assert sum(count for rate, count in groups if rate == 1e-3) == left
    assert all(bool(tensors[name].any()) for name in moves)


def test_counted_before_it_is_trained(int2: Path, tales: Path, run: tuple[Path, Any]) -> None:
    _, report = run
    found = estimate_finetune(int2, tales, taught(ALONE, teacher=None))
    assert found.trainable == report.trainable


def test_a_scale_below_zero_ends_the_run(int2: Path, tales: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = taught(ALONE, teacher=None, learning_rate=1.5, schedule=Schedule.CONSTANT)
    says = r"scale below 0 at step 1 of 6: lower --statistics-rate \(1.5\); .* an untrained adapter"
    with pytest.raises(IrqError, match=says):
        finetune(int2, tales, out, options)
    kept = load_file(out / "adapter_model.safetensors")
    assert not any(bool(tensor.any()) for tensor in kept.values())


def test_what_is_not_packed_has_none_to_train(int2: Path, tales: Path, tmp_path: Path) -> None:
    options = taught(ALONE, teacher=None, target_modules=("embed_tokens",), steps=1)
    with pytest.raises(UsageError, match="--target-modules embed_tokens: is not packed"):
        finetune(int2, tales, tmp_path / "out", options)


def test_the_last_step_may_not_drive_it_there(int2: Path, tales: Path, tmp_path: Path) -> None:
    options = taught(ALONE, teacher=None, learning_rate=1.5, schedule=Schedule.CONSTANT, steps=1)
    with pytest.raises(IrqError, match="scale below 0 at step 1 of 1"):
        finetune(int2, tales, tmp_path / "out", options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora": "statistics", "connection": "both"}, "--lora statistics has no elastic"),
        ({"lora": "plain", "statistics_rate": 1e-3}, "--statistics-rate: no statistics"),
        ({"lora": "plain", "statistics": "all"}, "statistics"),
        ({"lora": "statistics", "statistics_rate": 1.0, "learning_rate": 1.0}, "has one rate: giv"),
        ({"lora": "statistics", "statistics_rate": -1.0}, "--statistics-rate -1"),
        ({"lora": "plain", "beta_rate": 1e-2}, "--beta-rate: --lora plain has no betas"),
        ({"connection": "none", "beta_rate": 1e-2}, "--connection none has no betas"),
    ],
)
def test_contradictions(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        FinetuneOptions(**options)
