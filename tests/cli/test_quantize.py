"""`quantize` as it is meant to be used: what it prints, what it writes, and what it does not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.folders import assert_one_line, listing
from tests.tiny import write_source

from .process import Commands, nothing_left
from .sources import make_source


def test_a_run_from_end_to_end(irq: Commands, tmp_path: Path, source: Path) -> None:
    before = listing(source)
    result = irq("quantize", source, tmp_path / "out", "--bits", 3, "--bits-for", "down=4")
    assert result.code == 0
    assert result.err == ""
    assert listing(source) == before
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "irq_manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    totals = json.loads((out / "irq_manifest.json").read_text())["totals"]
    assert str(out) in result.out
    assert f"{totals['bits_per_weight']:.4f}" in result.out
    assert f"{totals['entropy_plain']:.4f} -> {totals['entropy']:.4f}" in result.out
    assert f"{totals['relative_error']:.5f}" in result.out
    assert "names and shapes" in result.out
    assert "Traceback" not in result.out


def test_json_agrees_with_the_table(irq: Commands, tmp_path: Path, source: Path) -> None:
    table = irq("quantize", source, tmp_path / "a").out
    result = irq("quantize", source, tmp_path / "b", "--json")
    report = json.loads(result.out)
    assert result.err == ""
    assert listing(tmp_path / "a") == listing(tmp_path / "b")
    assert report["out"] == str(tmp_path / "b")
    assert report["bytes_out"] == sum(p.stat().st_size for p in (tmp_path / "b").iterdir())
    assert f"{report['bits_per_weight']:.4f}" in table
    assert f"{report['share']:.1%} of {report['weights']:,} weights, nf4" in table
    assert f"{report['entropy_plain']:.4f} -> {report['entropy']:.4f} bits a code" in table
    assert f"{report['relative_error']:.5f}" in table
    assert len(report["worst"]) == 3
    for tensor in report["worst"]:
        assert f"{tensor['relative_error']:.5f}        {tensor['name']} (nf4)" in table


def test_a_dry_run_writes_nothing_and_is_exact(irq: Commands, tmp_path: Path, source: Path) -> None:
    args = ("quantize", source, tmp_path / "deep" / "out", "--bits", 2, "--max-shard-size", "3e-5")
    with nothing_left(tmp_path):
        result = irq(*args, "--dry-run", "--json")
        table = irq(*args, "--dry-run")
    assert (result.code, table.code) == (0, 0)
    assert (result.err, table.err) == ("", "")
    found = json.loads(result.out)
    report = json.loads(irq(*args, "--json").out)
    files = [p for p in (tmp_path / "deep" / "out").iterdir() if p.name != "irq_manifest.json"]
    assert found["bytes_out"] == sum(p.stat().st_size for p in files)
    assert found["shards"] == sum(p.suffix == ".safetensors" for p in files) > 1
    for key in ("bytes_in", "weights", "quantized_weights", "bits_per_weight", "share"):
        assert found[key] == report[key]
    assert f"{found['bytes_out']:,} bytes + manifest" in table.out
    assert f"{found['bits_per_weight']:.4f}" in table.out
    assert f"({found['quantized_tensors']} of {found['tensors']} tensors" in table.out
    assert f"{found['disk_needed']:,} bytes" in table.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cwd", "model", "name"),
    [
        (".", "org/source", "source-irq-nf4"),
        (".", "org/source/", "source-irq-nf4"),
        ("work", "../org/source", "source-irq-nf4"),
        ("org/source/deep", "..", None),
        (".", "org/link", "link-irq-nf4"),
    ],
)
def test_the_default_output(
    irq: Commands, tmp_path: Path, cwd: str, model: str, name: str | None
) -> None:
    source = make_source(tmp_path / "org" / "source")
    (source / "deep").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "org" / "link").symlink_to("source")
    result = irq("quantize", model, "--dry-run", "--json", cwd=tmp_path / cwd)
    if name is None:
        assert result.code == 2
        assert "source-irq-nf4: inside the source" in result.err
    else:
        assert json.loads(result.out)["out"] == name
        assert irq("quantize", model, cwd=tmp_path / cwd).code == 0
        assert (tmp_path / cwd / name / "config.json").exists()


def test_little_quantized_is_said(irq: Commands, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", rows=16)
    result = irq("quantize", source, tmp_path / "out", "--json")
    assert result.code == 0
    assert result.err.startswith("irq-convert: only ")
    assert result.err.count("\n") == 1
    json.loads(result.out)


def test_long_paths_are_not_broken(irq: Commands, tmp_path: Path, source: Path) -> None:
    out = tmp_path / ("long-" * 20) / "[bold]out[/bold]"
    result = irq("quantize", source, out)
    assert result.code == 0
    assert re.search(rf"^artifact +{re.escape(str(out))}$", result.out, re.MULTILINE)
    with nothing_left(tmp_path):
        again = irq("quantize", source, out)
    assert again.err.count("\n") == 1
    assert str(out) in again.err


def test_embeddings_when_asked(irq: Commands, tmp_path: Path) -> None:
    write_source(tmp_path / "s")
    dry = irq("quantize", tmp_path / "s", tmp_path / "a", "--include-embeddings", "--dry-run")
    result = irq("quantize", tmp_path / "s", tmp_path / "a", "--include-embeddings")
    assert result.code == 0
    share = re.search(r"quantized +([0-9.]+%)", result.out)
    assert share is not None
    assert float(share[1].rstrip("%")) > 99
    assert share[0] in dry.out
    rows = irq("inspect", tmp_path / "a", "--by", "kind").out
    assert re.search(r"embed_tokens .* nf4", rows)
    assert re.search(r"lm_head .* nf4", rows)
    assert irq("verify", tmp_path / "a", "--against", tmp_path / "s").code == 0


def test_embeddings_of_an_unknown_class(irq: Commands, tmp_path: Path, source: Path) -> None:
    with nothing_left(tmp_path):
        result = irq("quantize", source, tmp_path / "a", "--include-embeddings")
    assert result.code == 2
    assert_one_line(result.err.strip(), "--include-embeddings", "leave it out")
