"""Merging by quantizing again: what survives is measured, and too little of it refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from irq_convert.artifact.contents import open_artifact
from irq_convert.artifact.verify import verify_artifact
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError
from irq_convert.jobs.export.grids import check_grids
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.progress import Progress
from tests.folders import listing, read_json, read_tensors

from .make import Q0, adapted, exact_delta, make_artifact, values_of, write_adapter


def options(**more: Any) -> MergeOptions:
    return MergeOptions(to=MergeTo.IRQ, check=Check.LAYERS, **more)


def survival_of(artifact: Path, adapter: Path, out: Path) -> tuple[dict[str, float], float]:
    """By tensor and overall, from the files."""
    before, after = values_of(artifact), values_of(out)
    found, errors, changes = {}, 0.0, 0.0
    for module, cols, _ in adapted(artifact, adapter):
        name = f"{module}.weight"
        delta = exact_delta(adapter, module, cols).numpy()
        error = float(((after[name] - (before[name] + delta)) ** 2).sum())
        change = float((delta**2).sum())
        found[name] = 1 - error / change
        errors, changes = errors + error, changes + change
    return found, 1 - errors / changes


@pytest.mark.parametrize("kind", ["iec", "plain"])
@pytest.mark.parametrize("codebook", ["nf4", "int2"])
def test_what_survives_quantizing_again(tmp_path: Path, kind: str, codebook: str) -> None:
    artifact = make_artifact(tmp_path / "art", codebook)
    adapter = write_adapter(tmp_path / "adapter", artifact, kind=kind, rank=5, size=0.01)
    report = merge(artifact, adapter, tmp_path / "out", options(min_survival=-9, tile_weights=4000))
    wanted, overall = survival_of(artifact, adapter, tmp_path / "out")
    assert report.survived == pytest.approx(overall, abs=1e-6)
    assert {layer.tensor: layer.survived for layer in report.layers} == pytest.approx(
        wanted, abs=1e-6
    )
    assert {layer.how for layer in report.layers} == {"requantized"}
    assert verify_artifact(tmp_path / "out").ok
    manifest = read_json(tmp_path / "out" / "irq_manifest.json")
    entry = manifest["tensors"][f"{Q0}.weight"]
    assert entry["survived"] == pytest.approx(wanted[f"{Q0}.weight"], abs=1e-6)
    before, after = read_tensors(artifact), read_tensors(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }


def test_too_little_survives(artifact: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, kind="plain", size=1e-5)
    before = listing(tmp_path)
    with pytest.raises(IrqError) as caught:
        merge(artifact, adapter, tmp_path / "out", options())
    message = str(caught.value)
    for word in ("--min-survival 0.5", "--to dense", "block-pooled"):
        assert word in message
    assert "\n" not in message
    assert listing(tmp_path) == before


def test_another_objective(artifact: Path, iec: Path, tmp_path: Path) -> None:
    for name in ("entropy", "mse"):
        merge(artifact, iec, tmp_path / name, options(objective=name))
    merge(artifact, iec, tmp_path / "default", options())
    codes = {
        name: read_tensors(tmp_path / name)[f"{Q0}.weight"]
        for name in ("entropy", "mse", "default")
    }
    assert torch.equal(codes["default"], codes["entropy"])
    assert not torch.equal(codes["mse"], codes["entropy"])
    mse = read_json(tmp_path / "mse" / "irq_manifest.json")
    entropy = read_json(tmp_path / "entropy" / "irq_manifest.json")
    assert mse["options"]["objective"] == "mse"
    assert (
        mse["tensors"][f"{Q0}.weight"]["relative_error"]
        < entropy["tensors"][f"{Q0}.weight"]["relative_error"]
    )


def test_a_change_of_nothing_leaves_the_bytes(artifact: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, kind="plain", size=0.0)
    report = merge(artifact, adapter, tmp_path / "out", options())
    assert {layer.how for layer in report.layers} == {"unchanged"}
    before, after = read_tensors(artifact), read_tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_learned_on_a_moved_artifact(artifact: Path, block: Path, tmp_path: Path) -> None:
    """Its tau goes back to eight bits although the second adapter adds nothing."""
    merge(artifact, block, tmp_path / "once", options())
    second = write_adapter(tmp_path / "second", tmp_path / "once", kind="plain", size=0.0)
    with pytest.raises(IrqError, match=r"keeps 0\.000 of what the adapter learned"):
        merge(tmp_path / "once", second, tmp_path / "twice", options())
    merge(tmp_path / "once", second, tmp_path / "twice", options(min_survival=-1))
    assert verify_artifact(tmp_path / "twice").ok


@pytest.mark.parametrize("kind", ["plain", "block"])
def test_integer_zero_points_stay_integers(tmp_path: Path, kind: str) -> None:
    """Quantized again they are; a moved tau has left them, which nothing hides."""
    make_artifact(tmp_path / "float", "int4")
    artifact = tmp_path / "integer"
    spec = QuantSpec("int4", 32, refine=2, zero_point="integer")
    quantize(str(tmp_path / "float-source"), artifact, QuantizeOptions(spec, threads=1))
    adapter = write_adapter(tmp_path / "adapter", artifact, kind=kind, size=0.05)
    merge(artifact, adapter, tmp_path / "out", options(min_survival=-9))
    merged = open_artifact(tmp_path / "out")
    off = check_grids(merged.quantized, 1 << 20, Progress())
    changed = {f"{module}.weight" for module, _, _ in adapted(artifact, adapter)}
    assert {name for name, grid in off.items() if grid.off} == (
        changed if kind == "block" else set()
    )
    noted = read_json(tmp_path / "out" / "irq_manifest.json")["options"]
    assert (noted["refine"], noted["zero_point"]) == (2, "integer")
    assert verify_artifact(tmp_path / "out").ok
