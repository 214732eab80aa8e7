"""The check of a finished merge finds what it is there to find."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from irq_convert.checkpoint.header import read_header
from irq_convert.errors import IrqError
from irq_convert.jobs.merge.check_layers import check_layers
from irq_convert.jobs.merge.check_logits import check_logits
from irq_convert.jobs.merge.fold import check_folded
from irq_convert.jobs.merge.inputs import Inputs, open_inputs
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, Dtype, MergeOptions, MergeTo, TauDtype
from irq_convert.jobs.merge.plan import plan_merge
from irq_convert.progress import Progress

from .make import Q0, change_weights, write_adapter

NONE = Check.NONE
CASES = [
    MergeOptions(check=NONE),
    MergeOptions(check=NONE, dtype=Dtype.BFLOAT16),
    MergeOptions(check=NONE, dtype=Dtype.FLOAT16),
    MergeOptions(check=NONE, to=MergeTo.IRQ),
    MergeOptions(check=NONE, to=MergeTo.IRQ, tau=TauDtype.FLOAT16),
    MergeOptions(check=NONE, to=MergeTo.IRQ, tau=TauDtype.UINT8),
]


def flip(folder: Path, tensor: str, at: int, mask: int) -> None:
    path = folder / "model.safetensors"
    where = read_header(path).tensors[tensor].offset + at
    data = bytearray(path.read_bytes())
    data[where] ^= mask
    path.write_bytes(data)


def check(inputs: Inputs, folder: Path, options: MergeOptions) -> list[float]:
    assert inputs.adapter is not None
    plan = plan_merge(inputs.artifact, inputs.match, options)
    found = check_layers(plan, inputs.adapter, folder, Progress())
    return [layer.bound for layer in found if layer.bound is not None]


@pytest.mark.parametrize(
    ("options", "kind"),
    [(o, k) for o in CASES for k in ("block", "iec", "plain") if k == "block" or o.to != "irq"],
    ids=lambda o: o if isinstance(o, str) else f"{o.to}-{o.dtype}-{o.tau}",
)
def test_a_sound_result_passes_and_a_damaged_one_does_not(
    artifact: Path, tmp_path: Path, options: MergeOptions, kind: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, kind=kind)
    merge(artifact, adapter, tmp_path / "out", options)
    inputs = open_inputs(artifact, adapter, tmp_path / "elsewhere", options)
    bounds = check(inputs, tmp_path / "out", options)
    assert len(bounds) == 8
    assert 0 < max(bounds) <= 1
    name = f"{Q0}.weight_tau" if options.to == MergeTo.IRQ else f"{Q0}.weight"
    dtype = options.stored.value if options.to == MergeTo.IRQ else options.dtype.value
    width = {"float16": 2, "uint8": 1, "bfloat16": 2}.get(dtype, 4)
    for number in range(1, 9):  # the top bit of the exponent, or of the code
        flip(tmp_path / "out", name, number * width - 1, 0x80 if width == 1 else 0x40)
    with pytest.raises(IrqError, match=r"times what rounding explains"):
        check(inputs, tmp_path / "out", options)


def test_quantized_again_is_only_reported(artifact: Path, iec: Path, tmp_path: Path) -> None:
    options = MergeOptions(to=MergeTo.IRQ, check=Check.LAYERS, min_survival=-9)
    report = merge(artifact, iec, tmp_path / "out", options)
    for layer in report.layers:
        assert layer.check is not None
        assert layer.check.bound is None
        assert layer.check.difference > 1e-4


def test_a_folded_adapter_is_checked(artifact: Path, iec: Path, tmp_path: Path) -> None:
    options = MergeOptions(to=MergeTo.ADAPTER, check=NONE)
    merge(artifact, iec, tmp_path / "out", options)
    inputs = open_inputs(artifact, iec, tmp_path / "elsewhere", options)
    assert inputs.adapter is not None
    checks = check_folded(inputs.adapter, inputs.match, tmp_path / "out", Progress())
    assert len(checks) == 8
    assert all(c.bound is not None and c.bound <= 1 for c in checks)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.{Q0}.lora_A.weight"][2, 3] *= 1 + 1e-3

    change_weights(tmp_path / "out", change)
    with pytest.raises(IrqError, match=f"{Q0}: folded, it differs"):
        check_folded(inputs.adapter, inputs.match, tmp_path / "out", Progress())


@pytest.mark.slow
def test_logits_find_a_file_that_was_lost(artifact: Path, iec: Path, tmp_path: Path) -> None:
    """A setting that no layer's check looks at: the wrong rope, or a norm that was not carried."""
    options = MergeOptions(check=Check.LOGITS)
    merge(artifact, iec, tmp_path / "out", options)
    inputs = open_inputs(artifact, iec, tmp_path / "elsewhere", options)
    assert inputs.adapter is not None
    found = check_logits(
        inputs.artifact, inputs.adapter, tmp_path / "out", {"F32"}, options, Progress()
    )
    assert found.difference is not None
    assert found.difference <= 1e-5
    assert found.effect is not None
    assert found.effect > 0.01
    flip(tmp_path / "out", "model.norm.weight", 3, 0x80)
    with pytest.raises(IrqError, match="logits differ from base plus adapter"):
        check_logits(
            inputs.artifact, inputs.adapter, tmp_path / "out", {"F32"}, options, Progress()
        )
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    with pytest.raises(IrqError, match="does not run as base plus adapter do"):
        check_logits(
            inputs.artifact, inputs.adapter, tmp_path / "out", {"F32"}, options, Progress()
        )


def test_a_check_that_fails_leaves_nothing(
    artifact: Path, iec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from irq_convert.jobs.merge import check_layers as layers

    monkeypatch.setattr(layers, "SIGMAS", 1e-9)
    monkeypatch.setattr(layers, "NOISE", 0.0)
    with pytest.raises(IrqError, match="was not kept"):
        merge(artifact, iec, tmp_path / "out", MergeOptions(check=Check.LAYERS))
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_run_are_left_alone(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from irq_convert.jobs.merge import check_logits as logits

    adapter = write_adapter(tmp_path / "adapter", artifact)
    monkeypatch.setattr(logits, "available_memory", lambda: 1000)
    report = merge(artifact, adapter, tmp_path / "auto")
    assert report.logits.difference is None
    assert "GB of memory" in str(report.logits.reason)
    with pytest.raises(IrqError, match="--check logits: the models need about"):
        merge(artifact, adapter, tmp_path / "out", MergeOptions(check=Check.LOGITS))
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "auto")
