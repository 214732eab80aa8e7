"""`--to adapter`: what stock PEFT makes of it, in a process that has never heard of our package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from irq_convert.artifact.adapter import open_adapter
from irq_convert.errors import UsageError
from irq_convert.jobs.export.export import export
from irq_convert.jobs.merge.check_logits import relative_difference
from irq_convert.jobs.merge.estimate import estimate_merge
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo
from tests.folders import listing

from .make import PREFIX, Q0, WEIGHTS, exact_delta, linear_shapes, matches, write_adapter

IDS = [[1, 5, 9, 33, 70, 2, 2, 61], [4, 4, 8, 0, 79, 50, 21, 13]]
OPTIONS = MergeOptions(to=MergeTo.ADAPTER, check=Check.LAYERS)
CASES: dict[str, dict[str, Any]] = {
    "rank 8 divides": {"rank": 8},
    "rank 5 does not": {"rank": 5},
    "rank 7, rsLoRA": {"rank": 7, "use_rslora": True},
    "patterns": {
        "rank": 6,
        "rank_pattern": {"down_proj": 4, "q_proj": 11},
        "alpha_pattern": {"v_proj": 3},
    },
    "pooled": {"kind": "block", "rank": 3},
    "pooled, patterns": {"kind": "block", "rank": 4, "rank_pattern": {"q_proj": 2}},
    "plain": {"kind": "plain", "rank": 4},
    "input only": {"connection": "input", "rank": 8},
    "output only": {"connection": "output", "rank": 8},
    "half": {"rank": 8, "dtype": torch.bfloat16},
}


@dataclass(frozen=True)
class Case:
    """An adapter, its folded twin, and the dense model that each was compared on."""

    adapter: Path
    folded: Path
    merged: torch.Tensor
    found: torch.Tensor
    base: torch.Tensor


def dense_with(artifact: Path, adapter: Path, out: Path) -> Path:
    """A dense model with the adapter added by plain float64 arithmetic, in float32."""
    export(artifact, out, to="dense", dtype="float32")
    from safetensors.torch import save_file

    tensors = load_file(out / "model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for module, (_, cols, own) in linear_shapes(artifact).items():
        if matches(settings, module):
            name = f"{module}.weight"
            delta = exact_delta(adapter, module, cols, own)
            tensors[name] = (tensors[name].double() + delta).float()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def cases(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All cases through one process of stock PEFT."""
    root = tmp_path_factory.mktemp("plain")
    export(artifact, root / "dense", to="dense", dtype="float32")
    lines, folders = [], {}
    for number, (name, more) in enumerate(CASES.items()):
        adapter = write_adapter(root / f"a{number}", artifact, **more)
        merge(artifact, adapter, root / f"f{number}", OPTIONS)
        merged = dense_with(artifact, adapter, root / f"m{number}")
        folders[name] = (adapter, root / f"f{number}", number)
        lines += [
            (merged, None, root / f"wanted{number}"),
            (root / "dense", root / f"f{number}", root / f"found{number}"),
        ]
    lines.append((root / "dense", None, root / "base"))
    text = "".join(
        json.dumps(
            {"model": str(m), "adapter": a and str(a), "out": str(o), "ids": IDS},
        )
        + "\n"
        for m, a, o in lines
    )
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("stock_peft.py"))],
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        # No entry point teaches transformers our format, as where we are not installed.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
    base = torch.load(root / "base")
    return {
        name: Case(a, f, torch.load(root / f"wanted{n}"), torch.load(root / f"found{n}"), base)
        for name, (a, f, n) in folders.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_stock_peft_computes_the_same(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    allowed = 0.02 if name == "half" else 1e-5
    assert relative_difference(case.found, case.merged) <= allowed
    assert relative_difference(case.base, case.merged) > 0.05


@pytest.mark.parametrize("kind", ["iec", "block", "plain"])
def test_the_settings_are_those_of_a_plain_lora(artifact: Path, tmp_path: Path, kind: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, kind=kind, rank=5, use_rslora=True)
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "training_loss.csv").write_text("1,2\n")
    (adapter / "checkpoint-5").mkdir()
    (adapter / "checkpoint-5" / "optimizer.pt").write_text("")
    before = listing(adapter)
    report = merge(artifact, adapter, tmp_path / "out", OPTIONS)
    assert listing(adapter) == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "irq_adapter.json",
        "tokenizer.json",
    ]
    old = json.loads((adapter / "adapter_config.json").read_text())
    new = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert new["peft_type"] == "LORA"
    ours = {"connection", "pool", "block_size", "base_sha256", "peft_type"}
    assert not (set(new) & ours) - {"peft_type"}
    assert {k: v for k, v in new.items() if k not in ours} == {
        k: v for k, v in old.items() if k not in ours
    }
    note = json.loads((tmp_path / "out" / "irq_adapter.json").read_text())
    assert note["base"]["sha256"] == report.base_sha256
    assert note["lora"] == "plain"
    assert note["folded_from"]["sha256"] == report.adapter_sha256
    folded = open_adapter(tmp_path / "out")
    assert folded.config.kind == "plain"
    assert folded.layers[Q0].a.shape == (5, 96)
    assert all(layer.how == "folded" for layer in report.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["iec", "block"])
def test_folded_in_float64_and_rounded_to_the_adapters_dtype(
    artifact: Path, tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", artifact, kind=kind, dtype=dtype, rank=6)
    merge(artifact, adapter, tmp_path / "out", OPTIONS)
    folded = load_file(tmp_path / "out" / WEIGHTS)
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for module, (_, cols, own) in linear_shapes(artifact).items():
        if f"{PREFIX}{module}.lora_A.weight" not in folded:
            continue
        a, b = (folded[f"{PREFIX}{module}.lora_{x}.weight"] for x in "AB")
        assert a.dtype == b.dtype == dtype
        wanted = exact_delta(adapter, module, cols, own)
        found = 16 / 6 * (b.double() @ a.double())
        size = 16 / 6 * (b.double().abs() @ a.double().abs())
        assert bool(((found - wanted).abs() <= 2.1 * unit * size + 1e-6 * unit).all())


def test_saved_modules_are_kept(half: Path, tmp_path: Path) -> None:
    head = torch.randn(80, 96, generator=torch.Generator().manual_seed(5))
    adapter = write_adapter(
        tmp_path / "adapter", half, modules_to_save=["lm_head"], saved={"lm_head.weight": head}
    )
    merge(half, adapter, tmp_path / "out", OPTIONS)
    folded = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(folded[f"{PREFIX}lm_head.weight"], head)
    new = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert new["modules_to_save"] == ["lm_head"]


def test_the_folded_adapter_merges_like_the_unfolded(
    artifact: Path, iec: Path, tmp_path: Path
) -> None:
    merge(artifact, iec, tmp_path / "plain", OPTIONS)
    for name, adapter in (("one", iec), ("two", tmp_path / "plain")):
        merge(artifact, adapter, tmp_path / name, MergeOptions(check=Check.LAYERS))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-6) for name in one)


def test_it_is_never_written_over_the_adapter(artifact: Path, iec: Path) -> None:
    options = MergeOptions(to=MergeTo.ADAPTER, overwrite=True)
    with pytest.raises(UsageError, match="the source itself"):
        merge(artifact, iec, iec, options)


def test_the_estimate_counts_every_byte_but_the_records(
    artifact: Path, block: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(block, adapter)
    (adapter / "tokenizer.json").write_bytes(b" " * 3_000_000)
    found = estimate_merge(artifact, adapter, tmp_path / "out", OPTIONS)
    report = merge(artifact, adapter, tmp_path / "out", OPTIONS)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert report.bytes_out == sum(sizes.values())
    records = sizes["adapter_config.json"] + sizes["irq_adapter.json"]
    assert found.bytes_out == report.bytes_out - records
    assert found.disk_needed >= report.bytes_out
