"""`export` as it is meant to be used: what it prints, what it writes, and what it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.folders import listing
from tests.jobs.export.compare import decoded
from tests.jobs.export.make import put_on_grid, quantized, save_model
from tests.jobs.merge.make import write_adapter
from tests.paths import DEMO

from .process import Commands, fresh, nothing_left

WORDS = {
    "dense": "14 tensors: bfloat16",
    "mlx": "14 tensors: affine 4 bit, group 32, bfloat16",
    "compressed-tensors": "14 tensors: 4 bit, group 32, scales float32",
}


@pytest.fixture(scope="module")
def artifact(whole_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int4 with integer zero points, which every target holds."""
    return put_on_grid(shutil.copytree(whole_int4, tmp_path_factory.mktemp("export") / "irq"))


@pytest.mark.parametrize("to", list(WORDS))
def test_each_way(irq: Commands, artifact: Path, tmp_path: Path, to: str) -> None:
    before = listing(artifact)
    result = irq("export", artifact, tmp_path / "out", "--to", to)
    assert result.code == 0, result
    assert result.err == ""
    assert listing(artifact) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert f"{tmp_path / 'out'} ({to})" in result.out
    assert WORDS[to] in result.out
    for words in ("difference       largest", "relative error", "time"):
        assert words in result.out
    assert "changed codes" not in result.out
    paths = (str(tmp_path), str(artifact))  # those can be of any length
    assert all(
        len(line) <= 80 or any(path in line for path in paths) for line in result.out.splitlines()
    )


@pytest.mark.slow
@pytest.mark.parametrize("to", list(WORDS))
@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_writes_nothing(
    irq: Commands, artifact: Path, tmp_path: Path, to: str, as_json: bool
) -> None:
    out = tmp_path / "out"
    more = ["--json"] if as_json else []
    with nothing_left(tmp_path):
        result = irq("export", artifact, out, "--to", to, "--dry-run", *more)
    assert result.code == 0, result
    if not as_json:
        assert WORDS[to] in result.out
        assert "would write" in result.out
        return
    found = json.loads(result.out)
    irq("export", artifact, out, "--to", to)
    for name, size in found["files"].items():
        assert (out / name).stat().st_size == size


def test_the_report_as_json(irq: Commands, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = irq("export", artifact, out, "--to", "mlx", "--json", "--threads", "1")
    assert result.code == 0
    report = json.loads(result.out)
    assert report["to"] == "mlx"
    assert len(report["differences"]) == 14
    assert 0 < report["relative_error"] < 1e-4
    assert report["largest"] == max(found["largest"] for found in report["differences"])
    assert report["bytes_out"] == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())


def test_refitting_prints_the_loss(irq: Commands, whole_blocks: Path, tmp_path: Path) -> None:
    floats = quantized(whole_blocks, tmp_path / "floats", block_size=64)
    result = irq("export", floats, tmp_path / "out", "--to", "compressed-tensors", "--refit")
    assert result.code == 0, result
    for words in ("not exact", "zero points were no integers: fitted anew", "changed codes"):
        assert words in result.out


def test_long_remarks_are_wrapped(irq: Commands, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "gemma", head_dim=32, intermediate_size=344)
    folder = quantized(source, tmp_path / "irq", bits_for=(("q_proj", 2), ("layers.0.*up", 3)))
    result = irq("export", folder, tmp_path / "out", "--to", "mlx")
    assert result.code == 0, result
    assert "was not tried with mlx-lm" in " ".join(result.out.split())
    assert "no group of 32, 64, 128 divides" in " ".join(result.out.split())
    assert all(len(line) <= 80 or str(tmp_path) in line for line in result.out.splitlines())


def test_shards_and_overwriting(irq: Commands, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = irq("export", artifact, out, "--to", "mlx", "--max-shard-size", "0.0001")
    assert first.code == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    again = irq("export", artifact, out, "--to", "dense", "--dtype", "float32", "--overwrite")
    assert again.code == 0, again
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_gguf_by_commands_alone(irq: Commands, tmp_path: Path, merged: bool) -> None:
    """Quantize, merge and export; then the packages gguf and transformers read what is there."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    from transformers import AutoModelForCausalLM

    import irq_convert

    artifact = tmp_path / "demo-int4"
    wide = ("--bits", 4, "--codebook", "int", "--block-size", 32, "--threads", 1)
    assert irq("quantize", DEMO, artifact, *wide).code == 0
    if merged:
        adapter = write_adapter(tmp_path / "adapter", artifact, kind="block", rank=4, size=0.003)
        made = irq("merge", artifact, adapter, tmp_path / "merged", "--to", "irq")
        assert made.code == 0, made
        artifact = tmp_path / "merged"
    done = irq("export", artifact, tmp_path / "out", "--to", "gguf", "--json")
    assert done.code == 0, done
    report = json.loads(done.out)
    assert 0 < report["relative_error"] < 1e-5
    assert report["changed_codes"] == 0
    (file,) = (tmp_path / "out").glob("*.gguf")
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds == {"Q4_1", "F32"} | ({"BF16"} & kinds)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    for name, expected in decoded(artifact).items():
        gap = float((theirs.get_parameter(name).detach().float() - expected).abs().max())
        assert gap <= 2.0**-10 * float(expected.abs().max()), name  # d and m are float16
    ours = irq_convert.load(artifact, dtype=torch.float32)
    ids = torch.arange(1, 24)[None]
    with torch.no_grad():
        wanted, found = ours(ids).logits, theirs(ids).logits
    assert float((wanted - found).abs().max()) < 0.05 * float(wanted.abs().max())


def test_help_is_quick_and_whole() -> None:
    result = fresh("export", "--help")
    assert result.code == 0
    for words in ("--to", "--refit", "--fallback", "--dry-run", "--overwrite", "--json"):
        assert words in result.out
    assert all(len(line) <= 80 for line in result.out.splitlines())
