"""`verify_artifact`: every kind of damage is found and named, and nothing else is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from irq_convert.artifact.contents import open_artifact
from irq_convert.artifact.values import _code_bits, error_tolerance, measure_tensor
from irq_convert.artifact.verify import VerifyReport, verify_artifact
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.core.packing import pack_codes
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.progress import Progress
from tests.folders import SHARD, assert_one_line, change_config, change_json, change_tensors

from .helpers import (
    DOWN0,
    HIDDEN,
    NORM0,
    Q0,
    WIDE,
    change_manifest,
    copy,
    flip,
    make_artifact,
    make_source,
    reseal,
    source_tensors,
)

U8 = torch.uint8


def failures(folder: Path, source: Path | None = None) -> tuple[str, ...]:
    """What `verify_artifact` finds wrong; each is one line."""
    against = None if source is None else open_checkpoint(source)
    report = verify_artifact(folder, against=against)
    assert report.ok == (not report.failures)
    for line in report.failures:
        assert_one_line(line)
    return report.failures


def only(found: tuple[str, ...], *words: str) -> None:
    """There is exactly one failure, and it has all `words`."""
    assert len(found) == 1, found
    assert_one_line(found[0], *words)


@pytest.mark.parametrize(
    "options",
    [
        QuantizeOptions(threads=1),
        QuantizeOptions(QuantSpec("int2", 16, "mse", 3), threads=1, max_shard_bytes=5000),
        QuantizeOptions(QuantSpec("nf3", 1024, "none"), threads=1, bits_for=(("q_proj", 4),)),
    ],
    ids=["nf4", "int2-sharded", "nf3-mixed"],
)
def test_a_fresh_artifact_is_whole(tmp_path: Path, source: Path, options: QuantizeOptions) -> None:
    folder = make_artifact(source, tmp_path / "out", options)
    assert failures(folder) == ()
    assert failures(folder, source) == ()


def test_the_report_counts_and_measures(pristine: Path, source: Path) -> None:
    report = verify_artifact(pristine, against=open_checkpoint(source))
    manifest = open_artifact(pristine).manifest
    assert manifest is not None
    assert (report.files, report.quantized, report.copied) == (4, 8, 7)
    assert report.bytes == manifest["totals"]["bytes"]
    assert report.relative_error == pytest.approx(manifest["totals"]["relative_error"], rel=1e-4)
    assert report.entropy == pytest.approx(manifest["totals"]["entropy"], abs=1e-6)
    assert report.to_dict()["ok"] is True
    alone = verify_artifact(pristine)
    assert (alone.ok, alone.relative_error, alone.entropy) == (True, None, None)


def test_progress_ends_with_everything_done(pristine: Path, source: Path) -> None:
    class Listener(Progress):
        total = done = 0

        def phase(self, text: str, things: int, size: int) -> None:
            self.total = size

        def advance(self, size: int, finished: int) -> None:
            assert size >= 0
            self.done += size

    listener = Listener()
    verify_artifact(pristine, against=open_checkpoint(source), progress=listener)
    assert listener.done == listener.total > 0


@pytest.mark.parametrize(
    "part", [Q0, DOWN0, f"{DOWN0}_scale", f"{Q0}_tau", f"{DOWN0}_tau_grid", NORM0]
)
def test_one_flipped_bit_names_the_file_and_with_the_source_the_tensor(
    artifact: Path, source: Path, part: str
) -> None:
    flip(artifact, part)
    only(failures(artifact), SHARD, "sha256")
    first, *rest = failures(artifact, source)
    assert_one_line(first, SHARD, "sha256")
    assert rest
    assert all(line.startswith(part.split(".weight")[0]) for line in rest), rest


def test_the_exact_part_and_row_are_named(artifact: Path, source: Path) -> None:
    flip(artifact, Q0, at=17 * (HIDDEN // 2) + 5)
    assert any(
        f"{Q0} in {SHARD}" in line and "row 17" in line for line in failures(artifact, source)
    )
    flip(artifact, Q0, at=17 * (HIDDEN // 2) + 5)
    flip(artifact, f"{DOWN0}_scale", at=9 * 3 + 2)
    found = failures(artifact, source)
    assert any(f"{DOWN0}_scale in" in line and "row 9" in line for line in found)


def test_where_another_version_wrote_only_figures_are_compared(
    artifact: Path, source: Path
) -> None:
    change_manifest(artifact, lambda m: m.update(producer="irq-convert 0.0.1"))
    flip(artifact, Q0, mask=8)
    found = failures(artifact, source)
    assert_one_line(found[0], "sha256")
    assert found[1:]
    assert all("irq_manifest.json says" in line for line in found[1:])


def test_copied_bytes_are_compared_with_the_source(artifact: Path, source: Path) -> None:
    flip(artifact, NORM0, at=11)
    reseal(artifact)
    assert failures(artifact) == ()
    only(failures(artifact, source), NORM0, "byte 11 of 128")


def test_figures_of_the_manifest_are_recomputed(artifact: Path, source: Path) -> None:
    def lie(manifest: Any) -> None:
        manifest["tensors"][Q0]["relative_error"] *= 1.01
        manifest["tensors"][DOWN0]["entropy"] += 1e-5

    change_manifest(artifact, lie)
    found = failures(artifact)
    assert len(found) == 2
    assert "totals.entropy is" in found[0]  # no longer the mean of its tensors
    assert f"tensors[{DOWN0}] says entropy" in found[1]
    found = failures(artifact, source)
    assert len(found) == 3
    assert any(line.startswith(Q0) and "relative error" in line for line in found)


@pytest.mark.parametrize("entry", [None, [], {}, {"relative_error": "much"}])
def test_entries_without_figures_are_told_once(artifact: Path, source: Path, entry: object) -> None:
    """Also with the source, which they cannot be compared with."""
    change_manifest(artifact, lambda m: m["tensors"].update({Q0: entry}))
    found = failures(artifact)
    assert all(Q0 in line for line in found)
    more = set(failures(artifact, source)) - set(found)
    assert not any("relative error" in line for line in more), more


def test_the_source_dtype_is_compared(artifact: Path, source: Path) -> None:
    change_manifest(artifact, lambda m: m["tensors"][Q0].update(dtype="BF16"))
    only(failures(artifact, source), Q0, "F32", "BF16")


def test_totals_are_checked(artifact: Path) -> None:
    change_manifest(artifact, lambda m: m["totals"].update(weights=1, bits_per_weight="4"))
    found = failures(artifact)
    assert len(found) == 2
    assert_one_line(found[0], "totals.weights", "1")
    assert_one_line(found[1], "totals.bits_per_weight")


def test_another_source_is_named(artifact: Path, source: Path, tmp_path: Path) -> None:
    bigger = make_source(tmp_path / "bigger", layers=3)
    only(failures(artifact, bigger), str(bigger), "another source", "tiny-llama")
    same_headers = make_source(tmp_path / "finetuned", seed=1)
    words = (str(same_headers), "14 of 15 tensors", "another source", "'tiny-llama' with --against")
    only(failures(artifact, same_headers), *words)  # nothing blames the artifact
    change_manifest(artifact, lambda m: m["source"].update(revision="abc"))
    only(failures(artifact, same_headers), "another revision", "'tiny-llama' at revision abc")
    flip(artifact, NORM0)
    found = failures(artifact, same_headers)
    for name in (SHARD, Q0, DOWN0, NORM0):
        assert any(line.startswith(name) for line in found)


def test_every_source_tensor_is_accounted_for(artifact: Path, tmp_path: Path) -> None:
    """Without the fingerprint, which would stop it before."""
    (artifact / "irq_manifest.json").unlink()
    other = make_source(tmp_path / "other")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["mtp.weight"] = torch.zeros(3)
        tensors["logit_scale"] = torch.zeros(2)
        tensors[DOWN0] = torch.zeros(HIDDEN, WIDE + 1)
        del tensors["position_ids"]

    change_tensors(other, change)
    found = [line for line in failures(artifact, other) if "irq_manifest.json" not in line]
    assert len(found) == 4
    for name, words in {
        "mtp.weight": ("missing", "F32 [3]"),
        "logit_scale": ("F32 []", "F32 [2]"),
        DOWN0: ("[64, 172]", "F32 [64, 173]"),
        "position_ids": ("not in the source",),
    }.items():
        (line,) = (line for line in found if line.startswith(f"{name} "))
        assert_one_line(line, *words)


def test_a_truncated_shard_is_named(artifact: Path, source: Path) -> None:
    path = artifact / SHARD
    path.write_bytes(path.read_bytes()[:-100])
    for found in (failures(artifact), failures(artifact, source)):
        assert len(found) == 2
        assert_one_line(found[0], SHARD, "bytes")
        assert_one_line(found[1], SHARD, "truncated")


def test_damaged_shards_of_many_are_told_apart(source: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(threads=1, max_shard_bytes=8000)
    folder = make_artifact(source, tmp_path / "out", options)
    shard = open_artifact(folder).checkpoint.tensors[f"{DOWN0}_tau"].shard.name
    flip(folder, f"{DOWN0}_tau", 3, 4, shard)
    found = failures(folder, source)
    assert_one_line(found[0], shard, "sha256")
    assert found[1:]
    assert all(line.startswith(DOWN0) for line in found[1:])


def test_files_missing_added_and_changed_are_named(artifact: Path) -> None:
    (artifact / "tokenizer.json").unlink()
    (artifact / "assets" / "extra.bin").write_bytes(b"x")
    (artifact / "README.md").write_text("# A card of its own\n")
    (artifact / "config.json").write_text((artifact / "config.json").read_text() + "\n")
    (artifact / "assets" / "note.txt").write_text("longer than it was\n")
    found = sorted(failures(artifact))
    assert len(found) == 4
    assert_one_line(found[0], "assets/extra.bin", "not part")
    assert_one_line(found[1], "assets/note.txt", "19 bytes", "5")
    assert_one_line(found[2], "config.json", "bytes")
    assert_one_line(found[3], "tokenizer.json", "missing")


def test_hidden_files_of_a_download_are_no_failure(artifact: Path) -> None:
    (artifact / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (artifact / ".cache" / "huggingface").mkdir(parents=True)
    (artifact / ".cache" / "huggingface" / "x.metadata").write_text("1")
    (artifact / ".git").mkdir()
    (artifact / ".git" / "HEAD").write_text("ref")
    assert failures(artifact) == ()


def test_a_hub_cache_of_links_is_verified(pristine: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in sorted(pristine.rglob("*")) if p.is_file()):
        (blobs / str(number)).write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(pristine)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(number))
    assert failures(snapshot) == ()


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", ""])
def test_the_manifest_cannot_lead_outside(artifact: Path, name: str) -> None:
    change_manifest(artifact, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    only(failures(artifact), repr(name), "not inside")


@pytest.mark.parametrize("entry", [None, [], {"bytes": 4}, {"bytes": None, "sha256": "0"}])
def test_odd_entries_of_the_manifest_are_failures(artifact: Path, entry: object) -> None:
    change_manifest(artifact, lambda m: m["files"].update({"tokenizer.json": entry}))
    only(failures(artifact), "tokenizer.json")


def test_a_missing_manifest_is_a_failure_and_the_rest_is_still_checked(
    artifact: Path, source: Path
) -> None:
    (artifact / "irq_manifest.json").unlink()
    only(failures(artifact), "irq_manifest.json", "missing", "checksums")
    change_tensors(artifact, lambda t: t[f"{Q0}_scale_grid"].fill_(-1.0))
    flip(artifact, NORM0)
    found = failures(artifact, source)
    assert len(found) == 3
    assert_one_line(found[1], f"{Q0}_scale_grid", "step -1")
    assert_one_line(found[2], NORM0, "byte 0")


def test_a_manifest_that_cannot_be_read_is_a_failure(artifact: Path) -> None:
    (artifact / "irq_manifest.json").write_text("{")
    only(failures(artifact), "irq_manifest.json", "not JSON")


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_a_destroyed_file_is_a_failure_not_an_exception(artifact: Path, name: str) -> None:
    (artifact / name).write_bytes(b"\0" * 64)
    found = failures(artifact)
    assert len(found) == 2
    assert all(name in line for line in found)


def test_all_structural_problems_are_listed(artifact: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{Q0}_tau"]
        tensors[f"{DOWN0}_tau_renamed"] = tensors.pop(f"{DOWN0}_tau")

    change_tensors(artifact, change)
    found = failures(reseal(artifact))
    assert len(found) == 2
    assert {line.split()[0] for line in found} == {f"{Q0}_tau", f"{DOWN0}_tau"}


def test_edited_bits_are_found_without_checksums(artifact: Path) -> None:
    change_config(artifact, lambda raw: raw.update(codebook="nf3", bits=3))
    assert len(failures(artifact)) == 7  # the file, and six tensors of four bits
    assert len(failures(reseal(artifact))) == 6


def test_another_codebook_of_the_same_bits_is_found(artifact: Path, source: Path) -> None:
    change_config(artifact, lambda raw: raw.update(codebook="int4"))

    def agree(manifest: Any) -> None:
        for entry in manifest["tensors"].values():
            if entry["codebook"] == "nf4":
                entry["codebook"] = "int4"

    change_manifest(artifact, agree)
    reseal(artifact)
    assert failures(artifact) == ()
    only(failures(artifact, source), "6 of 15 tensors differ")


def set_grid(name: str, row: int, column: int, value: float) -> Callable[[Any], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][row, column] = value

    return change


def negative_scale(tensors: dict[str, torch.Tensor]) -> None:
    """One block of row 5 stands for a negative scale; all others for 0 or more."""
    tensors[f"{DOWN0}_scale_grid"][0] = torch.tensor([0.5, -3.0])
    tensors[f"{DOWN0}_scale"][:] = 7
    tensors[f"{DOWN0}_scale"][5, 1] = 2


def unused_bits(tensors: dict[str, torch.Tensor]) -> None:
    tensors[DOWN0][40, -1] |= 0x80  # 172 codes of 3 bits leave 4 bits of the last byte


GRID = f"{DOWN0}_scale_grid"
ILLEGAL: list[tuple[Callable[[Any], None], tuple[str, ...]]] = [
    (set_grid(GRID, 0, 0, -1e-9), (GRID, "group 0", "step")),
    (set_grid(GRID, 0, 0, math.nan), (GRID, "group 0", "step nan")),
    (set_grid(f"{Q0}_tau_grid", 0, 0, math.inf), (f"{Q0}_tau_grid", "step inf")),
    (set_grid(GRID, 0, 1, 0.5), (GRID, "offset 0.5")),
    (set_grid(GRID, 0, 1, math.nan), (GRID, "offset nan")),
    (set_grid(GRID, 0, 1, 2.0**21), (GRID, "offset 2097152")),
    (set_grid(GRID, 0, 1, 2.0**21 - 1), (GRID, "group 0", "code + offset")),
    (set_grid(GRID, 0, 0, 3e38), (f"{DOWN0}_scale", "inf", "finite")),
    (negative_scale, (f"{DOWN0}_scale in", "row 5, block 1", "-0.5", "at least 0")),
    (unused_bits, (DOWN0, "row 40", "unused bits")),
]


@pytest.mark.parametrize(("change", "words"), ILLEGAL)
def test_illegal_values_are_found(
    artifact: Path, change: Callable[[Any], None], words: tuple[str, ...]
) -> None:
    change_tensors(artifact, change)
    only(failures(reseal(artifact)), *words)


def test_groups_and_rows_are_counted_over_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(source, lambda t: t.update({name: torch.randn(2000, HIDDEN)}))
    monkeypatch.setattr("irq_convert.artifact.values.TILE_WEIGHTS", 1)
    folder = make_artifact(source, tmp_path / "out", QuantizeOptions(threads=1))
    assert failures(folder, source) == ()
    broken = copy(folder, tmp_path / "broken")
    change_tensors(broken, set_grid(f"{name}_tau_grid", 6, 1, 0.25))
    only(failures(reseal(broken)), f"{name}_tau_grid", "group 6", "0.25")
    flip(folder, f"{name}_tau", at=1999)
    assert any("row 1999" in line for line in failures(folder, source))


def test_wide_statistics_are_checked_too(artifact: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("_scale", "_tau"):
            del tensors[f"{Q0}{part}_grid"]
            tensors[Q0 + part] = torch.ones(HIDDEN, 1, dtype=torch.float16)
        tensors[f"{Q0}_scale"][7] = -1
        tensors[f"{Q0}_tau"][8] = -1  # a tau may be

    change_tensors(artifact, widen)
    module = Q0.removesuffix(".weight")
    wide = {"scale_dtype": "float16", "tau_dtype": "float16"}
    change_config(artifact, lambda raw: raw["overrides"].update({module: wide}))
    found = failures(reseal(artifact))
    assert_one_line(found[0], f"{Q0}_scale", "row 7, block 0", "-1")
    assert all("bits_per_weight" in line for line in found[1:])


def test_no_artifact_is_wrong_usage(source: Path, tmp_path: Path) -> None:
    for folder in (source, tmp_path / "absent"):
        with pytest.raises(UsageError):
            verify_artifact(folder)


def test_a_source_that_cannot_be_read_is_an_error(
    pristine: Path, source: Path, tmp_path: Path
) -> None:
    damaged = copy(source, tmp_path / "damaged")
    checkpoint = open_checkpoint(damaged)
    (damaged / SHARD).write_bytes((damaged / SHARD).read_bytes()[:9000])
    with pytest.raises(IrqError, match="damaged"):
        verify_artifact(pristine, against=checkpoint)


NEGATIVE = (-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004)
POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1)


def test_the_measured_error_is_that_of_numpy(pristine: Path, source: Path) -> None:
    """The error by the formula of the specification, written out here in numpy."""
    artifact, dense = open_artifact(pristine), source_tensors()
    stored = {k: v.numpy() for k, v in load_file(pristine / SHARD).items() if k.startswith(Q0)}
    (tensor,) = (t for t in artifact.quantized if t.name == Q0)
    with TileReader() as reader:
        result = measure_tensor(reader, tensor, open_checkpoint(source).tensors[Q0])
    codes = np.stack([stored[Q0] & 15, stored[Q0] >> 4], axis=2).reshape(HIDDEN, HIDDEN)
    levels = np.array([*NEGATIVE, 0, *POSITIVE])
    pair = []
    for part in ("_scale", "_tau"):
        step, offset = stored[f"{Q0}{part}_grid"][0]
        pair.append(step * (stored[Q0 + part].astype(np.float64) + offset))
    weights = levels[codes] * pair[0] + pair[1]
    original = dense[Q0].double().numpy()
    error = ((original - weights) ** 2).sum() / (original**2).sum()
    assert result.relative_error == pytest.approx(error, rel=1e-5)
    entropy = []
    for row in codes:
        shares = np.bincount(row) / HIDDEN
        entropy.append(-sum(p * math.log2(p) for p in shares if p))
    assert result.entropy == pytest.approx(np.mean(entropy), rel=1e-12)


@settings(max_examples=40)
@given(
    bits=st.sampled_from([2, 3, 4]),
    rows=st.integers(1, 4),
    cols=st.integers(1, 70),
    block=st.sampled_from([16, 32]),
    seed=st.integers(0, 1000),
)
def test_entropy_is_that_of_each_block_by_length(
    bits: int, rows: int, cols: int, block: int, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, cols), dtype=np.uint8)
    per_row = -(-cols // block)
    blank = torch.zeros(rows, per_row, dtype=U8)
    packed = pack_codes(torch.from_numpy(codes), bits)
    q = QuantizedTensor(packed, blank, blank, None, None, cols, f"int{bits}", block)
    total = 0.0
    for row in codes:
        for start in range(0, cols, block):
            piece = row[start : start + block]
            shares = np.bincount(piece) / len(piece)
            total -= len(piece) * sum(p * math.log2(p) for p in shares if p)
    assert _code_bits(q) == pytest.approx(total, rel=1e-9, abs=1e-9)


HARD = {
    "constant": torch.full((20, 200), 0.3),
    "zeros": torch.zeros(20, 200),
    "two levels": (torch.rand(20, 200, generator=torch.Generator().manual_seed(0)) < 0.5).float(),
    "far from zero": 1 + 1e-5 * torch.randn(20, 200, generator=torch.Generator().manual_seed(1)),
    "one spike": torch.nn.functional.pad(torch.full((20, 1), 1e4), (0, 199))
    + 1e-2 * torch.randn(20, 200, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64), QuantSpec("nf2", 1024, "mse", 3)])
def test_nearly_exact_tensors_do_not_fail_by_rounding(tmp_path: Path, spec: QuantSpec) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = {f"layers.{i}.w.weight": t for i, t in enumerate(HARD.values())}
    save_file(tensors, source / SHARD, {"format": "pt"})
    (source / "config.json").write_text('{"model_type": "of my own"}')
    folder = make_artifact(source, tmp_path / "out", QuantizeOptions(spec, threads=1))
    assert failures(folder, source) == ()


def test_the_tolerance_of_an_ordinary_error_is_a_thousandth(pristine: Path) -> None:
    for tensor in open_artifact(pristine).quantized:
        assert 1e-3 * 0.01 <= error_tolerance(tensor, 0.01) < 1.3e-3 * 0.01


def test_a_report_in_json_holds_every_failure() -> None:
    report = VerifyReport("x", ("a", "b"), 1, 2, 3, 4)
    assert report.to_dict()["failures"] == ("a", "b")
    assert report.to_dict()["ok"] is False


def test_the_index_is_checked(source: Path, tmp_path: Path) -> None:
    folder = make_artifact(
        source, tmp_path / "out", QuantizeOptions(threads=1, max_shard_bytes=8000)
    )
    index = folder / "model.safetensors.index.json"
    change_json(index, lambda raw: raw["weight_map"].update(x=raw["weight_map"][Q0]))
    found = failures(folder)
    assert_one_line(found[0], index.name, "bytes")
    assert_one_line(found[1], "'x'")
