"""`open_artifact` and `read_quantized`: what is found, and what is refused from headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from irq_convert.artifact.config import ModuleFormat, QuantizationConfig
from irq_convert.artifact.contents import open_artifact, read_quantized
from irq_convert.artifact.structure import part_specs
from irq_convert.artifact.values import check_values
from irq_convert.checkpoint.reader import TileReader
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.quantize.options import QuantizeOptions
from tests.folders import SHARD, assert_one_line, change_config, change_tensors
from tests.paths import ROOT

from .helpers import (
    DOWN0,
    HIDDEN,
    LINEARS,
    NORM0,
    Q0,
    WIDE,
    change_manifest,
    make_artifact,
    source_tensors,
)

Tensors = dict[str, torch.Tensor]


def refusal(folder: Path) -> str:
    """The line that `open_artifact` refuses `folder` with."""
    with pytest.raises(IrqError) as error:
        open_artifact(folder)
    assert error.value.exit_code == 1
    assert_one_line(str(error.value))
    return str(error.value)


def test_every_source_tensor_is_found_as_quantized_or_copied(pristine: Path) -> None:
    artifact = open_artifact(pristine)
    linears = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in LINEARS.items()
    }
    assert {t.name: t.source_shape for t in artifact.quantized} == linears
    copied = {info.name: (info.dtype, info.shape) for info in artifact.copied}
    rest = {n: t for n, t in source_tensors().items() if n not in linears}
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
    assert copied == {n: (names[t.dtype], tuple(t.shape)) for n, t in rest.items()}
    assert artifact.weights == sum(t.numel() for t in source_tensors().values())
    assert artifact.manifest is not None
    assert artifact.bits_per_weight == artifact.manifest["totals"]["bits_per_weight"]


def test_columns_and_parts_follow_the_specification(pristine: Path) -> None:
    tensors = {t.name: t for t in open_artifact(pristine).quantized}
    down = tensors[DOWN0]
    assert (down.format.codebook, down.format.columns) == ("nf3", WIDE)
    assert (down.shape.rows, down.shape.cols, down.shape.blocks_per_row) == (HIDDEN, WIDE, 3)
    assert {s: (p.dtype, p.shape) for s, p in down.parts.items()} == {
        "": ("U8", (HIDDEN, 65)),
        "_scale": ("U8", (HIDDEN, 3)),
        "_tau": ("U8", (HIDDEN, 3)),
        "_scale_grid": ("F32", (1, 2)),
        "_tau_grid": ("F32", (1, 2)),
    }
    assert down.nbytes == HIDDEN * (65 + 3 + 3) + 16
    assert tensors[Q0].format == ModuleFormat("nf4", 64)


def test_a_missing_manifest_is_none(artifact: Path) -> None:
    (artifact / "irq_manifest.json").unlink()
    assert open_artifact(artifact).manifest is None


def test_shards_are_opened_through_their_index(source: Path, tmp_path: Path) -> None:
    folder = make_artifact(source, tmp_path / "out", QuantizeOptions(max_shard_bytes=8000))
    artifact = open_artifact(folder)
    assert len(artifact.checkpoint.shards) > 2
    assert len(artifact.quantized) == 2 * len(LINEARS)
    name = artifact.quantized[0].parts["_tau"].shard.name
    (folder / name).unlink()
    assert_one_line(refusal(folder), name, "missing")


def write(folder: Path, tensors: Tensors, config: QuantizationConfig) -> Path:
    folder.mkdir()
    save_file(tensors, folder / SHARD, {"format": "pt"})
    document = {"quantization_config": config.to_dict()}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("shape", [(3, 5, 100), (70,), (2, 2, 2, 33)])
def test_leading_dimensions_are_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    q = quantize_tensor(dense.reshape(-1, shape[-1]), QuantSpec("int3", 32), threads=1)
    specs = part_specs("experts.up", shape, ModuleFormat("int3", 32))
    stored = {specs[s].name: part.reshape(specs[s].shape) for s, part in q.parts().items()}
    config = QuantizationConfig(
        ModuleFormat("int3", 32), (), {"experts.up": ModuleFormat("int3", 32, columns=shape[-1])}
    )
    artifact = open_artifact(write(tmp_path / "a", stored, config))
    (tensor,) = artifact.quantized
    assert tensor.source_shape == shape
    with TileReader() as reader:
        read = read_quantized(reader, tensor, 0, tensor.shape.rows)
    assert torch.equal(dequantize_tensor(read), dequantize_tensor(q))


def test_wide_statistics_have_no_grids(tmp_path: Path) -> None:
    fmt = ModuleFormat("nf2", 16, "float16", "float32")
    stored = {
        "m.weight": torch.zeros(2, 8, dtype=torch.uint8),
        "m.weight_scale": torch.ones(2, 2, dtype=torch.float16),
        "m.weight_tau": torch.full((2, 2), 3.0),
    }
    artifact = open_artifact(write(tmp_path / "a", stored, QuantizationConfig(fmt)))
    (tensor,) = artifact.quantized
    with TileReader() as reader:
        dense = dequantize_tensor(read_quantized(reader, tensor, 0, 2))
    assert torch.equal(dense, torch.full((2, 32), 2.0))
    extra = stored | {"m.weight_tau_grid": torch.zeros(1, 2)}
    folder = write(tmp_path / "b", extra, QuantizationConfig(fmt))
    assert_one_line(refusal(folder), "m.weight_tau_grid", "no such part")


@pytest.mark.parametrize("columns", [64 * 3, 64 * 8, 1000])
def test_tiles_are_slices_of_the_whole(tmp_path: Path, columns: int) -> None:
    rows = 600
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    q = quantize_tensor(dense, QuantSpec("nf2", 64), threads=1)
    stored = {f"m.weight{suffix}": part for suffix, part in q.parts().items()}
    config = QuantizationConfig(ModuleFormat("nf2", 64))
    (tensor,) = open_artifact(write(tmp_path / "a", stored, config)).quantized
    whole, step = dequantize_tensor(q), tensor.shape.row_multiple
    with TileReader() as reader:
        for start in range(0, rows, step):
            for stop in {start, min(start + 1, rows), min(start + step, rows), rows}:
                tile = read_quantized(reader, tensor, start, stop)
                tile.check()
                assert torch.equal(dequantize_tensor(tile), whole[start:stop])
        for start, stop in [(1, 2), (step - 1, rows), (0, rows + 1), (-step, 0), (step, 0)]:
            if step > 1 or not 0 <= start <= stop <= rows:
                with pytest.raises(ValueError, match="rows"):
                    read_quantized(reader, tensor, start, stop)


def drop(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


def replace(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = value

    return change


U8 = torch.uint8
PARTS = ("_scale", "_tau", "_scale_grid", "_tau_grid")
DAMAGE: list[tuple[Callable[[Tensors], None], tuple[str, ...]]] = [
    (drop(DOWN0 + "_scale_grid"), (DOWN0 + "_scale_grid", "missing", "F32 [1, 2]")),
    (drop(DOWN0 + "_tau_grid"), (DOWN0 + "_tau_grid", "missing", "F32 [1, 2]")),
    (drop(Q0 + "_scale"), (Q0 + "_scale", "missing", "U8 [64, 1]")),
    (drop(Q0 + "_tau"), (Q0 + "_tau", "missing", "U8 [64, 1]")),
    (drop(Q0 + "_scale", Q0 + "_tau", Q0 + "_tau_grid"), (Q0 + "_scale", "missing")),
    (drop(Q0), (Q0, "missing")),
    (rename(Q0 + "_tau", Q0 + "_bias"), (Q0 + "_tau", "missing")),
    (rename(Q0, "model.layers.0.self_attn.k_proj.weight"), (Q0, "missing")),
    (replace(Q0, torch.zeros(HIDDEN, HIDDEN)), (Q0, "F32 [64, 64]", "U8")),
    (replace(Q0, torch.zeros(HIDDEN, 40, dtype=U8)), (Q0, "U8 [64, 1]", "[64, 80]")),
    (replace(Q0, torch.tensor(3, dtype=U8)), (Q0, "U8 []")),
    (replace(DOWN0, torch.zeros(HIDDEN, 64, dtype=U8)), (DOWN0, "64 bytes", "172", "65")),
    (replace(Q0 + "_scale", torch.zeros(HIDDEN, 2, dtype=U8)), ("U8 [64, 2]", "U8 [64, 1]")),
    (replace(Q0 + "_tau", torch.zeros(HIDDEN, 1)), (Q0 + "_tau", "F32 [64, 1]", "U8 [64, 1]")),
    (replace(Q0 + "_tau_grid", torch.zeros(2, 2)), ("F32 [2, 2]", "F32 [1, 2]")),
    (
        replace(Q0 + "_tau_grid", torch.zeros(1, 2, dtype=torch.float64)),
        ("F64 [1, 2]", "F32 [1, 2]"),
    ),
    (replace(NORM0 + "_scale", torch.zeros(1)), (NORM0, "BF16 [64]", NORM0 + "_scale", "U8")),
]


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(("change", "words"), DAMAGE)
def test_damaged_parts_are_refused_by_name(
    artifact: Path, change: Callable[[Tensors], None], words: tuple[str, ...], manifest: bool
) -> None:
    change_tensors(artifact, change)
    if not manifest:
        (artifact / "irq_manifest.json").unlink()
    assert_one_line(refusal(artifact), *words, "convert or download")


def test_codes_without_any_part_are_refused(artifact: Path) -> None:
    change_tensors(artifact, drop(*(Q0 + suffix for suffix in PARTS)))
    assert_one_line(refusal(artifact), Q0, "irq_manifest.json", "not quantized")
    (artifact / "irq_manifest.json").unlink()
    assert_one_line(refusal(artifact), Q0, "U8 [64, 32]", "modules_to_not_convert")
    change_config(artifact, lambda raw: raw["modules_to_not_convert"].append(Q0[: -len(".weight")]))
    assert Q0 in {info.name for info in open_artifact(artifact).copied}  # a source's own bytes


def test_a_tensor_of_another_width_is_known_from_the_manifest(artifact: Path) -> None:
    change_tensors(artifact, replace(Q0, torch.zeros(HIDDEN, 31, dtype=U8)))
    assert_one_line(refusal(artifact), Q0, "[64, 64]", "[64, 62]")


def test_a_whole_tensor_gone_is_known_from_the_manifest(artifact: Path) -> None:
    change_tensors(artifact, drop(Q0, *(Q0 + suffix for suffix in PARTS)))
    assert_one_line(refusal(artifact), Q0, "irq_manifest.json", "missing")


DOWN_MODULE = DOWN0.removesuffix(".weight")
CONFIG_DAMAGE: list[tuple[Callable[[Any], Any], tuple[str, ...]]] = [
    (lambda raw: raw["modules_to_not_convert"].append(DOWN_MODULE), (DOWN0, "not quantized")),
    (lambda raw: raw.update(codebook="nf3", bits=3), ("U8", "nf3")),
    (lambda raw: raw.update(codebook="int4"), ("int4", "nf4", "irq_manifest.json")),
    (lambda raw: raw.update(bits=2), ("bits 2",)),
    (lambda raw: raw.update(block_size=32), ("U8 [64, 1]", "U8 [64, 2]", "blocks of 32")),
    (lambda raw: raw.update(block_size=128), (DOWN0, "U8 [64, 3]", "U8 [64, 2]", "blocks of 128")),
    (lambda raw: raw.update(scale_dtype="float16"), ("U8", "F16")),
    (lambda raw: raw["overrides"].pop(DOWN_MODULE), (DOWN0, "130")),
    (lambda raw: raw["overrides"][DOWN_MODULE].pop("columns"), (DOWN0, "173")),
    (lambda raw: raw["overrides"][DOWN_MODULE].update(columns=171), (DOWN0, "171", "172")),
    (lambda raw: raw["overrides"][DOWN_MODULE].update(columns=170), (DOWN0, "columns 170", "64")),
    (lambda raw: raw["overrides"].update(x={"block_size": 32}), ("overrides x", "no tensor")),
    (lambda raw: raw["overrides"].update({DOWN0: {"block_size": 32}}), ("overrides", DOWN0)),
    (lambda raw: raw["overrides"].update(lm_head={"columns": 64}), ("lm_head",)),
    (lambda raw: raw.update(format_version=2), ("version 2", "upgrade")),
    (lambda raw: raw.update(unknown=1), ("unknown",)),
]


@pytest.mark.parametrize(("change", "words"), CONFIG_DAMAGE)
def test_a_configuration_that_contradicts_the_files_is_refused(
    artifact: Path, change: Callable[[Any], Any], words: tuple[str, ...]
) -> None:
    change_config(artifact, change)
    assert_one_line(refusal(artifact), *words)


MANIFEST_DAMAGE: list[tuple[Callable[[Any], Any], tuple[str, ...]]] = [
    (lambda m: m["tensors"].pop(Q0), (Q0, "lacks")),
    (lambda m: m["tensors"].update(x={}), ("x is quantized by", "missing")),
    (lambda m: m["tensors"].update({NORM0: {}}), (NORM0, "not quantized")),
    (lambda m: m["tensors"][Q0].update(shape=[64, 65]), (Q0, "[64, 65]", "[64, 64]")),
    (lambda m: m["tensors"][Q0].update(codebook="nf3"), (Q0, "'nf3'", "'nf4'")),
    (lambda m: m["tensors"][Q0].update(block_size=32), (Q0, "32", "64")),
    (lambda m: m["tensors"].update({Q0: []}), (Q0, "object")),
    (lambda m: m["tensors"][Q0].pop("entropy"), (Q0, "entropy", "None")),
    (lambda m: m["tensors"][Q0].update(relative_error="0"), (Q0, "relative_error", "'0'")),
    (lambda m: m["tensors"][Q0].update(entropy_plain=-1), (Q0, "entropy_plain", "-1")),
    (lambda m: m.update(format="gguf"), ("irq_manifest.json", "not a manifest")),
    (lambda m: m.pop("files"), ("irq_manifest.json", "files")),
]


@pytest.mark.parametrize(("change", "words"), MANIFEST_DAMAGE)
def test_a_manifest_that_contradicts_the_files_is_refused(
    artifact: Path, change: Callable[[Any], Any], words: tuple[str, ...]
) -> None:
    change_manifest(artifact, change)
    assert_one_line(refusal(artifact), *words)


def test_several_problems_are_counted(artifact: Path) -> None:
    change_tensors(artifact, drop(Q0 + "_tau", DOWN0 + "_tau"))
    assert "(1 more" in refusal(artifact)


def test_shards_must_say_that_they_are_for_torch(artifact: Path) -> None:
    save_file(load_file(artifact / SHARD), artifact / SHARD)
    assert_one_line(refusal(artifact), SHARD, "format")


def test_what_is_no_artifact_is_wrong_usage(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    for folder, word in (
        (source, "no quantization_config"),
        (tmp_path / "empty", "no config.json"),
        (other, "'gptq'"),
        (tmp_path / "absent", "no such folder"),
    ):
        with pytest.raises(UsageError) as error:
            open_artifact(folder)
        assert_one_line(str(error.value), str(folder), word)


def test_an_artifact_that_lost_its_config_is_damaged(artifact: Path) -> None:
    (artifact / "config.json").unlink()
    assert_one_line(refusal(artifact), "irq_manifest.json", "no config.json")


def test_an_artifact_without_quantized_tensors_is_refused(tmp_path: Path) -> None:
    config = QuantizationConfig(ModuleFormat("nf4", 64))
    folder = write(tmp_path / "a", {"w": torch.from_numpy(np.zeros(3))}, config)
    assert_one_line(refusal(folder), "no tensor is quantized")


VECTORS = sorted(path.parent for path in ROOT.glob("formats/vectors/*/config.json"))


@pytest.mark.parametrize("folder", VECTORS, ids=lambda folder: folder.name)
def test_golden_vectors_open_and_decode_bit_for_bit(folder: Path) -> None:
    wanted = load_file(folder / "dense.safetensors")
    artifact = open_artifact(folder)
    assert {tensor.name for tensor in artifact.quantized} == set(wanted)
    with TileReader() as reader:
        for tensor in artifact.quantized:
            dense = dequantize_tensor(read_quantized(reader, tensor, 0, tensor.shape.rows))
            dense = dense.reshape(tensor.stored_shape)
            dense = dense.mT.contiguous() if tensor.format.transposed else dense
            expected = wanted[tensor.name]
            assert dense.shape == expected.shape
            assert torch.equal(dense.view(torch.int32), expected.view(torch.int32))
            assert check_values(reader, tensor) is None
