"""The frame of every export: options, places, notes, and artifacts that come from a merge."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from irq_convert.artifact.contents import Artifact
from irq_convert.artifact.export_targets import TargetPage
from irq_convert.artifact.identity import artifact_identity
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.export import registry
from irq_convert.jobs.export.export import estimate_export, export
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.export.target import (
    Difference,
    ExportPlan,
    PlannedTensor,
    Target,
    TargetResult,
)
from irq_convert.progress import Progress
from tests.folders import listing, read_tensors

from .compare import decoded

MINE = ("dense", "mlx", "compressed-tensors")


class Watching(Progress):
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int, int]] = []
        self.bytes: list[int] = []
        self.tensors: list[int] = []

    def phase(self, text: str, tensors: int, nbytes: int) -> None:
        self.phases.append((text, tensors, nbytes))
        self.bytes.append(0)
        self.tensors.append(0)

    def advance(self, nbytes: int, finished: bool) -> None:
        self.bytes[-1] += nbytes
        self.tensors[-1] += finished


@pytest.mark.parametrize("to", MINE)
def test_the_estimate_is_exact(on_grid: Path, tmp_path: Path, to: str) -> None:
    options = ExportOptions(to, max_shard_bytes=150_000)
    before = listing(tmp_path)
    found = estimate_export(on_grid, tmp_path / "out", options)
    assert listing(tmp_path) == before
    watching = Watching()
    report = export(on_grid, tmp_path / "out", options, progress=watching)
    files = {
        path.relative_to(tmp_path / "out").as_posix(): path.stat().st_size
        for path in (tmp_path / "out").rglob("*")
    }
    note = files.pop("irq_export.json")
    assert files == found.files
    assert found.bytes_out + note == report.bytes_out
    assert found.storages == report.storages
    assert [total for _, _, total in watching.phases] == watching.bytes
    assert [count for _, count, _ in watching.phases] == watching.tensors


@pytest.mark.parametrize("to", MINE)
def test_threads_and_tiles_change_no_byte(on_grid: Path, tmp_path: Path, to: str) -> None:
    for name, threads, tile in (("one", 1, 1 << 20), ("two", 2, 3000)):
        options = ExportOptions(to, threads=threads, tile_weights=tile)
        export(on_grid, tmp_path / name, options)
    assert listing(tmp_path / "one") == listing(tmp_path / "two")


def test_the_note_says_where_it_comes_from(int4: Path, tmp_path: Path) -> None:
    before = listing(int4)
    export(int4, tmp_path / "out", ExportOptions("mlx", dtype="float16"))
    assert listing(int4) == before
    note = json.loads((tmp_path / "out" / "irq_export.json").read_text())
    assert note["format"] == "irq-export"
    assert note["artifact"]["sha256"] == artifact_identity(int4)
    assert note["options"]["to"] == "mlx"
    assert note["options"]["dtype"] == "float16"
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert not (tmp_path / "out" / "irq_manifest.json").exists()


def test_overwriting_replaces_what_this_program_made(int4: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(int4, out, ExportOptions("mlx"))
    with pytest.raises(UsageError, match="not empty"):
        export(int4, out, ExportOptions("dense"))
    export(int4, out, ExportOptions("dense", overwrite=True))
    assert "quantization" not in json.loads((out / "config.json").read_text())
    (out / "irq_export.json").unlink()
    with pytest.raises(UsageError, match="holds no result of quantizing, merging or exporting"):
        export(int4, out, ExportOptions("dense", overwrite=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "onnx"}, "--to onnx: choose one of dense, mlx, gguf, compressed-tensors"),
        ({"to": "mlx", "refit": True}, "--refit means nothing for --to mlx"),
        ({"to": "dense", "fallback": "q8_0"}, "--fallback means nothing for --to dense"),
        ({"to": "dense", "dtype": "int8"}, "--dtype int8: choose one of auto, bfloat16"),
        ({"to": "dense", "threads": 0}, "--threads 0"),
        ({"to": "dense", "max_shard_bytes": 0}, "shard of 0 bytes"),
        ({"to": "dense", "tile_weights": 0}, "tiles of 0"),
    ],
)
def test_options_that_make_no_sense(
    int4: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        export(int4, tmp_path / "out", ExportOptions(**options))  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_too_large_for_float16(int4: Path, tmp_path: Path) -> None:
    from tests.folders import change_tensors

    artifact = tmp_path / "irq"
    shutil.copytree(int4, artifact)
    (artifact / "irq_manifest.json").unlink()

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight_scale_grid"] *= 1e8

    change_tensors(artifact, enlarge)
    before = listing(tmp_path)
    for to in ("dense", "mlx"):
        with pytest.raises(IrqError, match=r"up_proj.*too large for \w+16: choose --dtype bf"):
            export(artifact, tmp_path / "out", ExportOptions(to, dtype="float16"))
    assert listing(tmp_path) == before


def test_a_damaged_file_leaves_nothing(int4: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "irq"
    shutil.copytree(int4, artifact)
    path = artifact / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    before = listing(tmp_path)
    for to in MINE:
        with pytest.raises(IrqError):
            export(artifact, tmp_path / "out", ExportOptions(to))
    assert listing(tmp_path) == before


@pytest.fixture(scope="module")
def merged(on_grid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block-pooled adapter merged into taus; those are float32, and off every grid."""
    from irq_convert.jobs.merge.merge import merge
    from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo
    from tests.jobs.merge.make import write_adapter

    folder = tmp_path_factory.mktemp("merged")
    adapter = write_adapter(folder / "adapter", on_grid, kind="block")
    options = MergeOptions(to=MergeTo.IRQ, check=Check.NONE)
    merge(on_grid, adapter, folder / "irq", options)
    return folder / "irq"


def test_a_merged_artifact_goes_to_dense_and_mlx(
    merged: Path, on_grid: Path, tmp_path: Path
) -> None:
    ours = decoded(merged)
    assert not all(torch.equal(weight, decoded(on_grid)[name]) for name, weight in ours.items())
    export(merged, tmp_path / "dense", ExportOptions("dense", dtype="float32"))
    found = read_tensors(tmp_path / "dense")
    assert all(torch.equal(found[name], weight) for name, weight in ours.items())
    report = export(merged, tmp_path / "mlx", ExportOptions("mlx", dtype="float32"))
    assert report.largest_relative < 2.0**-21
    assert report.changed_codes == 0
    words = read_tensors(tmp_path / "mlx")["model.layers.1.mlp.down_proj.weight"]
    stored = read_tensors(merged)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(words.view(torch.uint8), stored)


def test_a_merged_artifact_needs_refitting_for_compressed_tensors(
    merged: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="zero point that is no integer"):
        export(merged, tmp_path / "out", ExportOptions("compressed-tensors"))
    options = ExportOptions("compressed-tensors", refit=True)
    report = export(merged, tmp_path / "out", options)
    assert 0 < report.relative_error < 0.02
    exact = {found.exact: found.tensors for found in report.storages}
    assert exact == {True: 6, False: 8}  # the adapter leaves q, k or v and others alone


class Nothing(Target):
    """A target in one place: it writes the names of the tensors."""

    name: ClassVar[str] = "names"
    summary: ClassVar[str] = "names"

    def plan(self, artifact: Artifact, options: ExportOptions, progress: Progress) -> ExportPlan:
        tensors = tuple(PlannedTensor(t.name, "a name", exact=False) for t in artifact.quantized)
        size = sum(len(tensor.name) + 1 for tensor in tensors)
        return ExportPlan(artifact, options, {"names.txt": size}, tensors)

    def write(self, plan: ExportPlan, folder: Path, progress: Progress) -> TargetResult:
        names = [tensor.name for tensor in plan.tensors]
        (folder / "names.txt").write_text("".join(f"{name}\n" for name in names))
        return TargetResult([Difference(name, 1, 1.0, 1.0, 1.0, 1.0) for name in names], ("done",))


def test_a_fifth_target_is_a_module_and_a_line(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("a_fifth_target")
    module.TARGET = Nothing()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_fifth_target", module)
    monkeypatch.setitem(registry.TARGETS, "names", TargetPage(module="a_fifth_target"))
    report = export(int4, tmp_path / "out", ExportOptions("names"))
    assert report.relative_error == 1
    assert report.notes == ("done",)
    assert "model.layers.0.mlp.up_proj.weight" in (tmp_path / "out" / "names.txt").read_text()
    with pytest.raises(UsageError, match="--dtype means nothing for --to names"):
        export(int4, tmp_path / "two", ExportOptions("names", dtype="float16"))


def test_a_missing_package_is_named(
    int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Needy(Nothing):
        packages: ClassVar[tuple[str, ...]] = ("no_such_package_anywhere",)

    module = types.ModuleType("a_needy_target")
    module.TARGET = Needy()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_needy_target", module)
    monkeypatch.setitem(registry.TARGETS, "needy", TargetPage(module="a_needy_target"))
    with pytest.raises(UsageError, match="needs the package no_such_package_anywhere"):
        export(int4, tmp_path / "out", ExportOptions("needy"))
