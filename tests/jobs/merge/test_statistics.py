"""Merging adapters of scale and tau: codes stay, logits are those of base plus adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import irq_convert
from irq_convert import IecLoraConfig
from irq_convert.artifact.identity import artifact_identity
from irq_convert.artifact.verify import verify_artifact
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.merge.check_logits import probe_ids
from irq_convert.jobs.merge.estimate import estimate_merge
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo, TauDtype
from tests.adapters.helpers import randomize
from tests.folders import read_json, read_tensors

from .make import PREFIX, Q0, change_settings, change_weights, linear_shapes, values_of

ALONE: dict[str, Any] = {"r": 0, "statistics": "both"}


def trained(artifact: Path, folder: Path, size: float = 0.05, **options: Any) -> Path:
    """An adapter of statistics with random moves, saved by PEFT."""
    config = IecLoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **options)
    model = get_peft_model(irq_convert.load(artifact), config)
    randomize(model, 3, size=size)
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=probe_ids(80)).logits.double()


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["both", "scale", "tau"])
@pytest.mark.parametrize("dtype", [None, TauDtype.FLOAT32, TauDtype.FLOAT16])
def test_codes_stay_and_logits_are_those_of_base_plus_adapter(
    artifact: Path, tmp_path: Path, statistics: str, dtype: TauDtype | None
) -> None:
    adapter = trained(artifact, tmp_path / "lora", r=0, statistics=statistics)
    out = tmp_path / "out"
    report = merge(artifact, adapter, out, MergeOptions(to=MergeTo.IRQ, tau=dtype))
    before, after = read_tensors(artifact), read_tensors(out)
    for name in before:
        if name.endswith(".weight"):
            assert torch.equal(before[name], after[name])
    stored = TauDtype.UINT8 if dtype is None else dtype
    scale, tau = (after[f"{Q0}.weight{part}"].dtype for part in ("_scale", "_tau"))
    moved = getattr(torch, stored.value)
    assert (scale, tau) == (
        moved if statistics != "tau" else torch.uint8,
        moved if statistics != "scale" else torch.uint8,
    )
    assert (report.scale is None, report.tau is None) == (
        statistics == "tau",
        statistics == "scale",
    )
    costs = report.scale or report.tau
    assert costs is not None
    assert costs["stored"]["float32"]["rms"] < costs["stored"]["uint8"]["rms"] < 0.01
    assert {layer.how for layer in report.layers} == {
        "tau" if statistics == "tau" else "statistics"
    }
    assert verify_artifact(out).ok
    model = PeftModel.from_pretrained(irq_convert.load(artifact), adapter)
    bound = {TauDtype.FLOAT32: 1e-5, TauDtype.FLOAT16: 1e-3, TauDtype.UINT8: 0.05}[stored]
    assert difference(logits(irq_convert.load(out)), logits(model)) < bound


def test_what_was_trained_to_be_rounded_loses_nothing(artifact: Path, tmp_path: Path) -> None:
    """The forward with `rounded` and the merged 8-bit artifact are one model."""
    adapter = trained(artifact, tmp_path / "lora", **ALONE)
    merge(artifact, adapter, tmp_path / "out", MergeOptions(to=MergeTo.IRQ))
    model = PeftModel.from_pretrained(irq_convert.load(artifact), adapter)
    exact = logits(model)
    for module in model.modules():
        if hasattr(module, "rounded"):
            module.rounded = torch.uint8
    merged = logits(irq_convert.load(tmp_path / "out"))
    assert difference(merged, logits(model)) < 1e-5 < difference(merged, exact)


@pytest.mark.parametrize("kind", ["alone", "plain", "block"])
def test_dense(half: Path, tmp_path: Path, kind: str) -> None:
    """To the weights of the second reader, moved in float64 and rounded once."""
    options = {
        "alone": ALONE,
        "plain": {"r": 4, "connection": "none", "statistics": "both"},
        "block": {"r": 4, "pool": "block", "block_size": 32, "statistics": "tau"},
    }[kind]
    adapter = trained(half, tmp_path / "lora", **options)
    merge(half, adapter, tmp_path / "out", MergeOptions(dtype="float32", check=Check.LAYERS))
    model: Any = PeftModel.from_pretrained(irq_convert.load(half), adapter)
    layer = model.base_model.model.get_submodule(Q0)
    wanted = layer.get_base_layer().dequantize() + layer.get_delta_weight("default")
    found = read_tensors(tmp_path / "out")[f"{Q0}.weight"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_beside_matrices_what_stays_packed_and_what_does_not(
    artifact: Path, tmp_path: Path
) -> None:
    pooled = trained(artifact, tmp_path / "b", r=4, pool="block", statistics="scale")
    report = merge(artifact, pooled, tmp_path / "one", MergeOptions(to=MergeTo.IRQ))
    assert {layer.how for layer in report.layers} == {"statistics"}
    model = PeftModel.from_pretrained(irq_convert.load(artifact), pooled)
    assert difference(logits(irq_convert.load(tmp_path / "one")), logits(model)) < 0.05
    plain = trained(artifact, tmp_path / "p", r=4, connection="none", statistics="both")
    how = MergeOptions(to=MergeTo.IRQ, min_survival=-9)
    again = merge(artifact, plain, tmp_path / "two", how)
    assert {layer.how for layer in again.layers} == {"requantized"}
    with pytest.raises(UsageError, match="no plain LoRA can hold"):
        merge(artifact, plain, tmp_path / "three", MergeOptions(to=MergeTo.ADAPTER))
    assert not (tmp_path / "three").exists()


def test_records_and_estimate(artifact: Path, tmp_path: Path) -> None:
    adapter = trained(artifact, tmp_path / "lora", **ALONE)
    how = MergeOptions(to=MergeTo.IRQ)
    found = estimate_merge(artifact, adapter, tmp_path / "out", how)
    assert (found.how, found.kind) == ("moving scale and tau", "statistics")
    report = merge(artifact, adapter, tmp_path / "out", how)
    assert found.layers == len(report.layers) == len(linear_shapes(artifact))
    manifest = read_json(tmp_path / "out" / "irq_manifest.json")
    assert manifest["source"]["adapters"][0]["lora"] == "statistics"
    entry = manifest["tensors"][f"{Q0}.weight"]
    assert entry["merged"] == "statistics"
    assert entry["entropy"] == entry["base"]["entropy"]
    assert manifest["options"]["tau"] == "uint8"
    plain = read_json(artifact / "irq_manifest.json")
    assert manifest["totals"]["bits_per_weight"] == plain["totals"]["bits_per_weight"]
    with pytest.raises(UsageError, match="merged already"):
        merge(tmp_path / "out", adapter, tmp_path / "again", how)


@pytest.mark.slow
def test_a_second_adapter_on_the_result(artifact: Path, tmp_path: Path) -> None:
    adapter = trained(artifact, tmp_path / "lora", **ALONE)
    merge(artifact, adapter, tmp_path / "one", MergeOptions(to=MergeTo.IRQ))
    other = trained(tmp_path / "one", tmp_path / "second", **ALONE)
    merge(tmp_path / "one", other, tmp_path / "two", MergeOptions(to=MergeTo.IRQ))
    one, two = values_of(tmp_path / "one"), values_of(tmp_path / "two")
    assert not np.array_equal(one[f"{Q0}.weight"], two[f"{Q0}.weight"])
    assert artifact_identity(tmp_path / "one") != artifact_identity(tmp_path / "two")


def negative(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PREFIX}{Q0}.lora_irq_scale.weight"].fill_(-2)


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PREFIX}{Q0}.lora_irq_tau.weight"][0, 0] = float("inf")


def lost(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{PREFIX}{Q0}.lora_irq_tau.weight"]


def lost_both(tensors: dict[str, torch.Tensor]) -> None:
    lost(tensors)
    del tensors[f"{PREFIX}{Q0}.lora_irq_scale.weight"]


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("scale", "tau"):
        name = f"{PREFIX}{Q0}.lora_irq_{part}.weight"
        tensors[name] = tensors[name][:, :-1].contiguous()


def of_halves(tensors: dict[str, torch.Tensor]) -> None:
    name = f"{PREFIX}{Q0}.lora_irq_tau.weight"
    tensors[name] = tensors[name].int()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (negative, "driven a scale below 0"),
        (infinite, "holds NaN or infinite numbers"),
        (lost, "lora_irq_tau of .* is missing"),
        (lost_both, "its file holds nothing for it"),
        (narrow, "has statistics"),
        (of_halves, "must be a number for each block"),
    ],
)
def test_damaged(artifact: Path, tmp_path: Path, damage: Any, words: str) -> None:
    adapter = trained(artifact, tmp_path / "lora", **ALONE)
    change_weights(adapter, damage)
    with pytest.raises(IrqError, match=words):
        merge(artifact, adapter, tmp_path / "out", MergeOptions(to=MergeTo.IRQ))
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["lora"]
        or not (tmp_path / "out").exists()
    )


def test_settings_that_contradict_the_file(artifact: Path, tmp_path: Path) -> None:
    adapter = trained(artifact, tmp_path / "lora", **ALONE)
    settings = read_json(adapter / "adapter_config.json")
    how = MergeOptions(to=MergeTo.IRQ)
    for changes, words in (
        ({"statistics": "tau"}, "lora_irq_scale of .* is there"),
        ({"statistics": "all"}, "statistics 'all' must be one of"),
        ({"r": 0, "statistics": None}, "r 0 must be a positive number"),
        ({"r": 4}, "its file holds nothing for it"),
    ):
        change_settings(adapter, **copy.deepcopy(settings) | changes)
        with pytest.raises(IrqError, match=words):
            merge(artifact, adapter, tmp_path / "out", how)
    change_settings(adapter, **settings)
    assert "lora_irq_tau.weight" in "".join(load_file(adapter / "adapter_model.safetensors"))
