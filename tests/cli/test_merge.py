"""`merge` as it is meant to be used: what it prints, what it writes, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.folders import listing
from tests.jobs.merge.make import write_adapter

from .process import Commands, fresh, nothing_left

CHECK = ("--check", "layers")
WAYS = {"dense": "8 dense", "adapter": "8 folded", "irq": "8 by moving tau"}


@pytest.fixture(scope="module")
def artifact(tiny_nf4: Path) -> Path:
    return tiny_nf4


@pytest.fixture(scope="module")
def block(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("block") / "block", artifact, kind="block")


@pytest.fixture(scope="module")
def iec(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("iec") / "iec", artifact)


@pytest.mark.parametrize("to", ["dense", "adapter", "irq"])
def test_each_way(irq: Commands, artifact: Path, block: Path, tmp_path: Path, to: str) -> None:
    before = listing(artifact), listing(block)
    result = irq("merge", artifact, block, tmp_path / "out", "--to", to, *CHECK)
    assert result.code == 0, result
    assert result.err == ""
    assert (listing(artifact), listing(block)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert f"{tmp_path / 'out'} ({to})" in result.out
    assert WAYS[to] in result.out
    assert "layers checked   largest difference" in result.out
    assert "logits checked   no: not asked for" in result.out
    if to == "irq":
        assert irq("verify", tmp_path / "out").code == 0
        for name in ("float32 (this result)", "float16", "uint8", "how far it moved"):
            assert name in result.out
    paths = (str(tmp_path), "artifact", "adapter")  # those can be of any length
    assert all(
        len(line) <= 80 or any(path in line for path in paths) for line in result.out.splitlines()
    )


def test_quantizing_again_lists_the_layers(
    irq: Commands, artifact: Path, iec: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = irq("merge", artifact, iec, out, "--to", "irq", "--objective", "mse", *CHECK)
    assert result.code == 0, result
    assert "8 quantized again" in result.out
    assert "of what was learned (1 is all)" in result.out
    assert result.out.count("down_proj.weight") == 2
    assert "logits" in result.out


def test_the_report_as_json(irq: Commands, artifact: Path, block: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = irq("merge", artifact, block, out, "--to", "irq", "--tau", "float16", "--json", *CHECK)
    assert result.code == 0
    report = json.loads(result.out)
    assert report["to"] == "irq"
    assert report["kind"] == "block"
    assert report["tau_dtype"] == "float16"
    assert set(report["tau"]["stored"]) == {"float32", "float16", "uint8"}
    assert len(report["layers"]) == 8
    assert report["layers"][0]["check"]["bound"] <= 1
    assert report["bytes_out"] == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert report["largest_difference"] < 0.01
    label = "error of what an adapter was merged into: to base plus adapter"
    assert (label in irq("inspect", out).out, label in irq("inspect", artifact).out) == (
        True,
        False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("to", ["dense", "adapter", "irq"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_writes_nothing(
    irq: Commands, artifact: Path, block: Path, tmp_path: Path, to: str, as_json: bool
) -> None:
    out = tmp_path / "out"
    more = ["--json"] if as_json else []
    with nothing_left(tmp_path):
        result = irq("merge", artifact, block, out, "--to", to, "--dry-run", *more)
    assert result.code == 0, result
    assert irq("merge", artifact, block, out, "--to", to, *CHECK).code == 0
    records = {"irq_manifest.json", "irq_merge.json", "irq_adapter.json", "adapter_config.json"}
    paths = [path for path in out.rglob("*") if path.is_file() and path.name not in records]
    size = sum(path.stat().st_size for path in paths)
    if not as_json:
        assert f"{size:,} bytes" in result.out
        for word in ("memory", "check", "disk needed", "8 layers by"):
            assert word in result.out
        return
    found = json.loads(result.out)
    assert found["bytes_out"] == size
    assert found["disk_needed"] >= size
    assert found["layers"] == 8
    assert found["memory"] > 0


@pytest.mark.slow
def test_only_our_own_folders_are_overwritten(
    irq: Commands, artifact: Path, block: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert irq("merge", artifact, block, out, "--to", "dense", *CHECK).code == 0
    for to in ("irq", "adapter", "dense"):
        with nothing_left(out):
            assert irq("merge", artifact, block, out, "--to", to, *CHECK).code == 2
        result = irq("merge", artifact, block, out, "--to", to, "--overwrite", *CHECK)
        assert result.code == 0, result
    assert (out / "irq_merge.json").is_file()
    assert not (out / "irq_adapter.json").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("the only copy")
    with nothing_left(other):
        result = irq("merge", artifact, block, other, "--to", "dense", "--overwrite", *CHECK)
    assert result.code == 2
    assert "holds no result of quantizing, merging or exporting" in result.err
    trained = write_adapter(tmp_path / "trained", artifact, kind="plain")  # with irq_adapter.json
    with nothing_left(trained):
        result = irq("merge", artifact, block, trained, "--to", "adapter", "--overwrite", *CHECK)
    assert result.code == 2


def test_shards_and_threads(irq: Commands, artifact: Path, iec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ("--dtype", "bfloat16", "--max-shard-size", "1e-4", "--threads", 2)
    result = irq("merge", artifact, iec, out, "--to", "dense", *more, *CHECK)
    assert result.code == 0, result
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    assert (out / "model.safetensors.index.json").is_file()
    assert "14 in BF16" in result.out


@pytest.mark.slow
def test_logits_in_a_fresh_process(artifact: Path, iec: Path, tmp_path: Path) -> None:
    """The default check, with nothing imported before and nothing else on the streams."""
    result = fresh("merge", artifact, iec, tmp_path / "out", "--to", "dense")
    assert result.code == 0, result
    assert result.err == ""
    assert "logits checked   difference" in result.out
    assert "allowed" in result.out
    assert max(map(len, result.out.splitlines()[2:])) <= 80


def test_help_names_the_ways(irq: Commands) -> None:
    result = irq("merge", "--help")
    assert result.code == 0
    for word in ("dense", "adapter", "irq", "--min-survival", "--any-base", "Example: irq-convert"):
        assert word in result.out
