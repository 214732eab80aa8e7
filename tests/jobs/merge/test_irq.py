"""`--to irq`: moving tau, bit for bit, and quantizing again, measured."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from irq_convert.artifact.verify import verify_artifact
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo, TauDtype
from tests.folders import listing, read_json, read_tensors

from .make import DOWN0, Q0, adapted, exact_delta, make_artifact, values_of, write_adapter

CODEBOOKS = ("nf2", "nf3", "nf4", "int2", "int3", "int4")
PARTS = ("", "_scale", "_scale_grid")


def options(**more: Any) -> MergeOptions:
    return MergeOptions(to=MergeTo.IRQ, check=Check.LAYERS, **more)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_codes_and_scales_stay_bit_for_bit(tmp_path: Path, codebook: str) -> None:
    artifact = make_artifact(tmp_path / "art", codebook)
    adapter = write_adapter(tmp_path / "adapter", artifact, kind="block", rank=5)
    report = merge(artifact, adapter, tmp_path / "out", options(tile_weights=3000))
    before, after = read_tensors(artifact), read_tensors(tmp_path / "out")
    moved = adapted(artifact, adapter)
    assert len(moved) == 8
    for module, _, _ in moved:
        for part in PARTS:
            name = f"{module}.weight{part}"
            assert after[name].dtype == before[name].dtype
            assert torch.equal(after[name], before[name])
        assert after[f"{module}.weight_tau"].dtype == torch.float32
    names = {f"{module}.weight" for module, _, _ in moved}
    for name, tensor in before.items():
        if name.removesuffix("_tau").removesuffix("_tau_grid") not in names:
            assert tensor.view(torch.uint8).equal(after[name].view(torch.uint8))
    assert {layer.how for layer in report.layers} == {"tau"}
    assert verify_artifact(tmp_path / "out").ok


def test_a_merged_artifact_has_no_source(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "art", "nf3")
    adapter = write_adapter(tmp_path / "adapter", artifact, kind="block")
    merge(artifact, adapter, tmp_path / "out", options())
    source = open_checkpoint(tmp_path / "art-source")
    failures = verify_artifact(tmp_path / "out", against=source).failures
    assert any("an adapter was merged into it" in line for line in failures)


@pytest.mark.parametrize("codebook", ["nf3", "int2"])
def test_the_moved_artifact_is_exact(tmp_path: Path, codebook: str) -> None:
    artifact = make_artifact(tmp_path / "art", codebook)
    adapter = write_adapter(tmp_path / "adapter", artifact, kind="block")
    merge(artifact, adapter, tmp_path / "out", options())
    before, after = values_of(artifact), values_of(tmp_path / "out")
    taus = read_tensors(tmp_path / "out")
    for module, cols, own in adapted(artifact, adapter):
        name = f"{module}.weight"
        delta = exact_delta(adapter, module, cols, own).numpy()
        exact = before[name].astype(np.float64) + delta
        tau = taus[f"{name}_tau"].double().abs().repeat_interleave(own, 1)[:, :cols].numpy()
        size = np.abs(exact) + np.abs(before[name]) + tau
        assert (np.abs(after[name] - exact) <= 2**-24 * 1.01 * size).all()


@pytest.mark.parametrize("tau", list(TauDtype))
def test_the_cost_of_storing_tau_is_what_is_printed(
    artifact: Path, block: Path, tmp_path: Path, tau: TauDtype
) -> None:
    report = merge(artifact, block, tmp_path / "out", options(tau=tau))
    assert report.tau is not None
    before, after = read_tensors(artifact), read_tensors(tmp_path / "out")
    parts, moved = [], []
    for module, cols, own in adapted(artifact, block):
        name = f"{module}.weight"
        old = _statistic(before, name, "_tau")
        scale = _statistic(before, name, "_scale")
        delta = exact_delta(block, module, cols, own)[:, ::own]
        stored = _statistic(after, name, "_tau")
        assert after[f"{name}_tau"].dtype == getattr(torch, tau.value)
        assert (f"{name}_tau_grid" in after) == (tau == TauDtype.UINT8)
        parts.append((((stored - old) - delta) / scale).abs().reshape(-1))
        moved.append((delta / scale).abs().reshape(-1))
    for found, wanted in (
        (report.tau["stored"][tau.value], torch.cat(parts)),
        (report.tau["moved"], torch.cat(moved)),
    ):
        assert math.isclose(found["max"], float(wanted.max()), rel_tol=1e-6)
        assert math.isclose(found["rms"], float(wanted.square().mean().sqrt()), rel_tol=1e-6)
    stored = report.tau["stored"]
    assert stored["float32"]["rms"] < stored["float16"]["rms"] < stored["uint8"]["rms"]
    assert verify_artifact(tmp_path / "out").ok


def _statistic(tensors: dict[str, torch.Tensor], name: str, suffix: str) -> torch.Tensor:
    """Stored statistics in float64, by section 6 of the format."""
    stored = tensors[name + suffix].double()
    grid = tensors.get(f"{name}{suffix}_grid")
    if grid is None:
        return stored
    each = grid.double().repeat_interleave(256, 0)[: stored.numel()]
    exact = each[:, 0] * (stored.reshape(-1) + each[:, 1])
    return exact.float().double().view(stored.shape)


def test_the_configuration_says_what_is_stored(artifact: Path, tmp_path: Path) -> None:
    some = write_adapter(tmp_path / "some", artifact, kind="block")
    every = write_adapter(
        tmp_path / "every",
        artifact,
        kind="block",
        target_modules=[f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")],
    )
    merge(artifact, some, tmp_path / "a", options())
    merge(artifact, every, tmp_path / "b", options(tau=TauDtype.FLOAT16))
    one = read_json(tmp_path / "a" / "config.json")["quantization_config"]
    assert one["tau_dtype"] == "uint8"
    assert one["overrides"][Q0]["tau_dtype"] == "float32"
    assert "model.layers.0.mlp.up_proj" not in {
        name for name, own in one["overrides"].items() if "tau_dtype" in own
    }
    both = read_json(tmp_path / "b" / "config.json")["quantization_config"]
    assert both["tau_dtype"] == "float16"
    assert all("tau_dtype" not in own for own in both["overrides"].values())
    for folder in ("a", "b"):
        assert verify_artifact(tmp_path / folder).ok


def test_the_manifest_says_where_it_comes_from(artifact: Path, block: Path, tmp_path: Path) -> None:
    report = merge(artifact, block, tmp_path / "out", options())
    base = read_json(artifact / "irq_manifest.json")
    found = read_json(tmp_path / "out" / "irq_manifest.json")
    assert found["source"]["base"]["sha256"] == report.base_sha256
    assert found["source"]["base"]["source"] == base["source"]
    assert [entry["sha256"] for entry in found["source"]["adapters"]] == [report.adapter_sha256]
    assert found["source"]["tensors_sha256"] is None
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert found["tensors"][untouched] == base["tensors"][untouched]
    entry = found["tensors"][f"{Q0}.weight"]
    assert entry["entropy"] == base["tensors"][f"{Q0}.weight"]["entropy"]
    assert entry["base"]["relative_error"] == base["tensors"][f"{Q0}.weight"]["relative_error"]
    assert entry["relative_error"] < 1e-12
    assert entry["merged"] == "tau"
    assert found["totals"]["bits_per_weight"] == report.bits_per_weight
    assert found["totals"]["bits_per_weight"] > base["totals"]["bits_per_weight"]


@pytest.mark.parametrize("kind", ["block", "iec"])
def test_dense_layers_are_merged_in_their_dtype(half: Path, tmp_path: Path, kind: str) -> None:
    more = {"block_size": 32} if kind == "block" else {}
    adapter = write_adapter(tmp_path / "adapter", half, kind=kind, **more)
    merge(half, adapter, tmp_path / "out", options(min_survival=-9))
    before, after = read_tensors(half), read_tensors(tmp_path / "out")
    name = f"{DOWN0}.weight"
    delta = exact_delta(adapter, DOWN0, before[name].shape[1], more.get("block_size"))
    exact = before[name].double() + delta
    assert after[name].dtype == torch.bfloat16
    assert bool(((after[name].double() - exact).abs() <= exact.abs() * 2**-8 * 1.01).all())
    assert verify_artifact(tmp_path / "out").ok


def test_saved_modules(half: Path, tmp_path: Path) -> None:
    head = torch.randn(80, 96, generator=torch.Generator().manual_seed(5))
    adapter = write_adapter(
        tmp_path / "adapter",
        half,
        kind="block",
        block_size=32,
        modules_to_save=["lm_head"],
        saved={"lm_head.weight": head},
    )
    merge(half, adapter, tmp_path / "out", options())
    assert torch.equal(read_tensors(tmp_path / "out")["lm_head.weight"], head.bfloat16())
    assert verify_artifact(tmp_path / "out").ok


@pytest.mark.parametrize("any_base", [False, True])
def test_merging_twice(artifact: Path, block: Path, tmp_path: Path, any_base: bool) -> None:
    merge(artifact, block, tmp_path / "once", options())
    with pytest.raises(UsageError, match="merged already") as caught:
        merge(tmp_path / "once", block, tmp_path / "twice", options(any_base=any_base))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "twice").exists()


def test_a_second_adapter_on_a_merged_artifact(artifact: Path, block: Path, tmp_path: Path) -> None:
    merge(artifact, block, tmp_path / "once", options())
    second = write_adapter(tmp_path / "second", tmp_path / "once", kind="block", seed=9)
    merge(tmp_path / "once", second, tmp_path / "twice", options())
    before, after = values_of(artifact), values_of(tmp_path / "twice")
    codes, kept = read_tensors(artifact), read_tensors(tmp_path / "twice")
    for module, cols, own in adapted(artifact, second):
        name = f"{module}.weight"
        delta = exact_delta(block, module, cols, own) + exact_delta(second, module, cols, own)
        assert np.allclose(after[name], before[name] + delta.numpy(), rtol=0, atol=1e-5)
        assert torch.equal(codes[name], kept[name])
    manifest = read_json(tmp_path / "twice" / "irq_manifest.json")
    assert len(manifest["source"]["adapters"]) == 2
    iec = write_adapter(tmp_path / "iec", tmp_path / "twice", kind="iec", seed=3)
    merge(tmp_path / "twice", iec, tmp_path / "thrice", options())
    config = read_json(tmp_path / "thrice" / "config.json")["quantization_config"]
    assert config["tau_dtype"] == "uint8"
    assert not any("tau_dtype" in own for own in config["overrides"].values())
    assert verify_artifact(tmp_path / "thrice").ok


def test_without_a_manifest_there_is_none(artifact: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(artifact, bare)
    (bare / "irq_manifest.json").unlink()
    adapter = write_adapter(tmp_path / "adapter", bare, kind="block")
    merge(bare, adapter, tmp_path / "out", options())
    assert not (tmp_path / "out" / "irq_manifest.json").exists()
    assert len(values_of(tmp_path / "out")) == len(values_of(bare))


@pytest.mark.parametrize("kind", ["block", "iec"])
def test_tiles_and_threads_do_not_change_a_byte(artifact: Path, tmp_path: Path, kind: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, kind=kind)
    for name, tile, threads in (("one", 1 << 20, 1), ("many", 2000, 2)):
        merge(artifact, adapter, tmp_path / name, options(tile_weights=tile, threads=threads))
    one, many = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_a_tau_that_does_not_fit(artifact: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, kind="block", alpha=1e6)
    before = listing(tmp_path)
    with pytest.raises(IrqError, match=r"_proj\.weight: its tau cannot be stored as float16"):
        merge(artifact, adapter, tmp_path / "no", options(tau=TauDtype.FLOAT16))
    assert listing(tmp_path) == before
    report = merge(artifact, adapter, tmp_path / "out", options())
    assert report.tau is not None
    assert report.tau["stored"]["float16"] == {"max": None, "rms": None}


def test_logits_allow_for_layers_that_are_dense(half: Path, tmp_path: Path) -> None:
    """A kept layer's change is rounded to bfloat16, far more than moving tau costs."""
    adapter = write_adapter(tmp_path / "adapter", half, kind="block", block_size=32, size=0.2)
    report = merge(half, adapter, tmp_path / "out", MergeOptions(to=MergeTo.IRQ))
    assert report.logits.difference is not None
    assert report.logits.tolerance is not None
    assert 1e-4 < report.logits.difference < report.logits.tolerance < 0.2
