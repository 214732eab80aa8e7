"""Adapters as they really come: attached, trained some steps, saved, merged each way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import irq_convert
from irq_convert.jobs.merge.check_logits import relative_difference
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo, TauDtype

from .make import make_artifact

IDS = torch.tensor([[1, 5, 9, 33, 70, 2, 2, 61], [4, 4, 8, 0, 79, 50, 21, 13]])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8},
    "iec": {"r": 8},
    "iec, odd rank": {"r": 7, "use_rslora": True, "rank_pattern": {"down_proj": 5}},
    "block": {"r": 4, "pool": "block"},
    "block, output only": {"r": 4, "pool": "block", "connection": "output"},
}


@dataclass(frozen=True)
class Trained:
    """An artifact, an adapter saved after some steps, and the logits of both together."""

    artifact: Path
    adapter: Path
    logits: torch.Tensor
    before: torch.Tensor


def train(artifact: Path, folder: Path, kind: str) -> Trained:
    options = {"lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    options |= KINDS[kind]
    make = LoraConfig if kind == "plain" else irq_convert.IecLoraConfig
    torch.manual_seed(0)
    base = irq_convert.load(artifact, dtype=torch.float32).eval()
    with torch.no_grad():
        before = base(IDS).logits
    model = irq_convert.attach(base, make(**options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(6):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        logits = model(IDS).logits
    model.save_pretrained(str(folder))
    if kind == "plain":  # finetune writes this; PEFT's own configuration has no place for it
        from irq_convert.artifact.identity import artifact_identity

        note = f'{{"base": {{"sha256": "{artifact_identity(artifact)}"}}}}'
        (folder / "irq_adapter.json").write_text(note)
    return Trained(artifact, folder, logits, before)


@pytest.fixture(scope="module")
def trained(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    root = tmp_path_factory.mktemp("trained")
    return {kind: train(artifact, root / str(n), kind) for n, kind in enumerate(KINDS)}


def logits_of(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", [MergeTo.DENSE, MergeTo.ADAPTER])
def test_dense_and_folded(
    trained: dict[str, Trained], tmp_path: Path, kind: str, to: MergeTo
) -> None:
    case = trained[kind]
    assert relative_difference(case.before, case.logits) > 0.05
    options = MergeOptions(to=to, check=Check.LOGITS)
    report = merge(case.artifact, case.adapter, tmp_path / "out", options)
    assert len(report.layers) == 14
    assert report.logits.difference is not None
    assert report.logits.difference <= 1e-5
    folder = (tmp_path / "out", None) if to == MergeTo.DENSE else (case.artifact, tmp_path / "out")
    assert relative_difference(logits_of(*folder), case.logits) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("codebook", ["nf2", "nf3", "nf4", "int2", "int3", "int4"])
def test_block_pooled_to_irq(tmp_path: Path, codebook: str) -> None:
    artifact = make_artifact(tmp_path / "art", codebook)
    case = train(artifact, tmp_path / "adapter", "block")
    differences = {}
    for tau in TauDtype:
        options = MergeOptions(to=MergeTo.IRQ, tau=tau, check=Check.LAYERS)
        report = merge(artifact, case.adapter, tmp_path / tau, options)
        assert {layer.how for layer in report.layers} == {"tau"}
        differences[tau] = relative_difference(logits_of(tmp_path / tau), case.logits)
    assert differences[TauDtype.FLOAT32] <= 1e-5
    assert (
        differences[TauDtype.FLOAT32]
        < differences[TauDtype.FLOAT16]
        < differences[TauDtype.UINT8]
        < 0.2
    )


def test_quantized_again(trained: dict[str, Trained], tmp_path: Path) -> None:
    case = trained["iec"]
    options = MergeOptions(to=MergeTo.IRQ, check=Check.LOGITS, min_survival=-9)
    report = merge(case.artifact, case.adapter, tmp_path / "out", options)
    assert report.survived is not None
    assert report.logits.tolerance is None
    assert report.logits.difference is not None
    found = relative_difference(logits_of(tmp_path / "out"), case.logits)
    assert found < 2 * report.logits.difference + 0.05


def test_an_adapter_of_another_artifact(trained: dict[str, Trained], tmp_path: Path) -> None:
    other = make_artifact(tmp_path / "other", "nf3")
    with pytest.raises(irq_convert.UsageError, match="trained on the artifact"):
        merge(other, trained["iec"].adapter, tmp_path / "out")
