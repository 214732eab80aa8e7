"""`--to dense` against the independent reader and plain float64 arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from irq_convert.artifact.contents import open_artifact
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.export.export import export
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, Dtype, MergeOptions, MergeTo
from tests.folders import listing, read_tensors
from tests.formats import numpy_reader

from .make import DOWN0, exact_delta, linear_shapes, make_artifact, matches, write_adapter

LAYERS = Check.LAYERS
ULP = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
TINY = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
CODEBOOKS = ("nf2", "nf3", "nf4", "int2", "int3", "int4")


def exact_weights(artifact: Path, adapter: Path | None) -> dict[str, torch.Tensor]:
    """Every tensor of base plus adapter in float64 (others as they are), by the other reader."""
    dense = {n: torch.from_numpy(np.array(a)) for n, a in _read(artifact).items()}
    copied = read_tensors(artifact)
    settings = None
    if adapter is not None:
        settings = json.loads((adapter / "adapter_config.json").read_text())
    for module, (_, cols, own) in linear_shapes(artifact).items():
        name = f"{module}.weight"
        value = dense[name] if own is not None else copied[name]
        dense[name] = value.double()
        if adapter is not None and matches(settings or {}, module):
            block = own or (settings or {}).get("block_size")
            dense[name] = dense[name] + exact_delta(adapter, module, cols, block)
    return dense


def _read(artifact: Path) -> dict[str, np.ndarray]:
    found = numpy_reader.read_artifact(artifact)
    return {n: a for n, a in found.items() if n.endswith("_proj.weight") and a.dtype == np.float32}


def assert_one_rounding(found: torch.Tensor, exact: torch.Tensor) -> None:
    """`found` is `exact` rounded to nearest, or at most a hair beyond half a step from it."""
    allowed = exact.abs() * 2.0 ** -ULP[found.dtype] * (1 + 2**-10) + TINY[found.dtype]
    assert bool(((found.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("kind", ["plain", "iec", "block"])
@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.FLOAT16])
def test_within_one_rounding(artifact: Path, tmp_path: Path, kind: str, dtype: Dtype) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, kind=kind, rank=5)
    options = MergeOptions(dtype=dtype, check=LAYERS, tile_weights=5000, max_shard_bytes=100_000)
    report = merge(artifact, adapter, tmp_path / "out", options)
    merged, exact = read_tensors(tmp_path / "out"), exact_weights(artifact, adapter)
    base = read_tensors(artifact)
    quantized = {t.name for t in open_artifact(artifact).quantized}
    assert set(merged) == {t for t in base if "_scale" not in t and "_tau" not in t}
    for name, tensor in merged.items():
        assert tensor.dtype == getattr(torch, dtype.value), name
        if name in quantized:
            assert_one_rounding(tensor, exact[name])
        else:
            assert torch.equal(tensor, base[name].to(tensor.dtype))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == dtype.value
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert report.to == "dense"
    assert report.kind == kind
    assert len(report.layers) == 8


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_codebook_and_no_adapter(tmp_path: Path, codebook: str) -> None:
    artifact = make_artifact(tmp_path / "art", codebook)
    report = export(artifact, tmp_path / "out", to="dense")
    dense, exact = read_tensors(tmp_path / "out"), exact_weights(artifact, None)
    for name, value in exact.items():
        assert torch.equal(dense[name].double(), value)
    assert report.largest == 0


def test_auto_keeps_what_the_source_had(half: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", half, rank=6)
    merge(half, adapter, tmp_path / "out", MergeOptions(check=LAYERS))
    merged, base, exact = (
        read_tensors(tmp_path / "out"),
        read_tensors(half),
        exact_weights(half, adapter),
    )
    assert f"{DOWN0}.weight_scale" not in base  # the layer that was kept is merged like the rest
    changed = 0
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        if name in exact:
            assert_one_rounding(tensor, exact[name])
            changed += not torch.equal(tensor.double(), exact[name])
        else:
            assert tensor.view(torch.uint8).equal(base[name].view(torch.uint8))
    assert changed >= 8
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_without_a_manifest_config_json_decides(half: Path, tmp_path: Path) -> None:
    import shutil

    artifact = tmp_path / "art"
    shutil.copytree(half, artifact)
    (artifact / "irq_manifest.json").unlink()
    export(artifact, tmp_path / "out", to="dense")
    assert {t.dtype for t in read_tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_files_beside_the_weights_are_carried(artifact: Path, iec: Path, tmp_path: Path) -> None:
    merge(artifact, iec, tmp_path / "out", MergeOptions(check=LAYERS))
    before, after = listing(artifact), listing(tmp_path / "out")
    written = {"config.json", "model.safetensors", "irq_merge.json"}
    assert set(after) == (set(before) - {"irq_manifest.json"}) | written
    assert all(after[name] == before[name] for name in set(after) - written)
    note = json.loads(after["irq_merge.json"])
    assert note["format"] == "irq-merge"
    assert note["adapter"]["lora"] == "iec"
    assert note["base"]["sha256"] == note["adapter"]["base_sha256"]


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_and_rslora(artifact: Path, tmp_path: Path, rslora: bool) -> None:
    adapter = write_adapter(
        tmp_path / "adapter",
        artifact,
        use_rslora=rslora,
        rank_pattern={"down_proj": 7},
        alpha_pattern={"down_proj": 3, "q_proj": 50},
    )
    merge(artifact, adapter, tmp_path / "out", MergeOptions(check=LAYERS))
    merged, exact = read_tensors(tmp_path / "out"), exact_weights(artifact, adapter)
    for name, value in exact.items():
        assert_one_rounding(merged[name], value)


@pytest.mark.parametrize("connection", ["both", "input", "output", "none"])
def test_connections_that_are_switched_off(artifact: Path, tmp_path: Path, connection: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, connection=connection)
    merge(artifact, adapter, tmp_path / "out", MergeOptions(check=LAYERS))
    merged, exact = read_tensors(tmp_path / "out"), exact_weights(artifact, adapter)
    for name, value in exact.items():
        assert_one_rounding(merged[name], value)


def test_pooled_on_a_dense_layer(half: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", half, kind="block", block_size=32)
    merge(half, adapter, tmp_path / "out", MergeOptions(check=LAYERS))
    merged, exact = read_tensors(tmp_path / "out"), exact_weights(half, adapter)
    assert_one_rounding(merged[f"{DOWN0}.weight"], exact[f"{DOWN0}.weight"])


@pytest.mark.parametrize("dtype", [Dtype.AUTO, Dtype.FLOAT16])
def test_saved_modules_take_the_place(half: Path, tmp_path: Path, dtype: Dtype) -> None:
    head = torch.randn(80, 96, generator=torch.Generator().manual_seed(5))
    adapter = write_adapter(
        tmp_path / "adapter", half, modules_to_save=["lm_head"], saved={"lm_head.weight": head}
    )
    options = MergeOptions(dtype=dtype, check=LAYERS)
    report = merge(half, adapter, tmp_path / "out", options)
    wanted = torch.bfloat16 if dtype == Dtype.AUTO else torch.float16
    assert torch.equal(read_tensors(tmp_path / "out")["lm_head.weight"], head.to(wanted))
    assert report.saved == ("lm_head.weight",)


def test_too_large_for_the_dtype(artifact: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, alpha=1e9)
    before = listing(tmp_path)
    with pytest.raises(IrqError, match=r"too large for float16: choose --dtype bfloat16"):
        merge(artifact, adapter, tmp_path / "out", MergeOptions(dtype=Dtype.FLOAT16))
    assert listing(tmp_path) == before


def test_tiles_and_shards_do_not_change_a_number(artifact: Path, iec: Path, tmp_path: Path) -> None:
    for name, tile, shard in (("one", 1 << 20, 10**9), ("many", 2000, 50_000)):
        options = MergeOptions(
            dtype=Dtype.BFLOAT16, check=Check.NONE, tile_weights=tile, max_shard_bytes=shard
        )
        merge(artifact, iec, tmp_path / name, options)
    one, many = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_the_result_loads_and_computes(artifact: Path, iec: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    merge(artifact, iec, tmp_path / "out", MergeOptions(check=LAYERS))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    exact = exact_weights(artifact, iec)
    for name, parameter in model.named_parameters():
        if name in exact:
            assert_one_rounding(parameter.detach(), exact[name])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"min_survival": 1.5}, "--min-survival 1.5"),
        ({"min_survival": math.nan}, "--min-survival nan"),
        ({"threads": 0}, "--threads 0"),
        ({"to": MergeTo.IRQ, "objective": "best"}, "--objective best"),
        ({"to": MergeTo.DENSE, "objective": "mse"}, "--objective is for --to irq"),
        ({"to": MergeTo.ADAPTER, "dtype": Dtype.FLOAT16}, "--dtype is for --to dense"),
        ({"max_shard_bytes": 0}, "shard of 0 bytes"),
        ({"tile_weights": 0}, "tiles of 0"),
    ],
)
def test_options_that_make_no_sense(bad: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        MergeOptions(**bad)  # type: ignore[arg-type]
    assert words in str(caught.value)


@pytest.mark.slow
def test_saved_modules_in_the_logits(artifact: Path, tmp_path: Path) -> None:
    """Through PEFT's own wrapper of a saved module, in the models as they are used."""
    head = torch.randn(80, 96, generator=torch.Generator().manual_seed(5))
    saved = {"lm_head.weight": head}
    adapter = write_adapter(
        tmp_path / "adapter", artifact, modules_to_save=["lm_head"], saved=saved
    )
    for to in MergeTo:
        options = MergeOptions(to=to, check=Check.LOGITS, min_survival=-9)
        report = merge(artifact, adapter, tmp_path / "out" / to, options)
        assert report.logits.difference is not None
        if to != MergeTo.IRQ:
            assert report.logits.difference < 1e-5
