"""`--to compressed-tensors`, read by transformers with the compressed-tensors package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from irq_convert.core.spec import QuantSpec
from irq_convert.errors import UsageError
from irq_convert.jobs.export.compressed_tensors import pack_words
from irq_convert.jobs.export.export import export
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.export.report import ExportReport
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.folders import read_tensors

from .compare import decoded, our_logits, tokens
from .make import put_on_grid, quantized, save_model

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


def export_packed(artifact: Path, out: Path, **more: Any) -> ExportReport:
    return export(artifact, out, ExportOptions("compressed-tensors", **more))


def load_with_transformers(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    return model


def stored_weights(folder: Path, bits: int, group: int) -> dict[str, torch.Tensor]:
    """`(q - zp) * step` in the steps' dtype from the file, unpacked by compressed-tensors."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    tensors = read_tensors(folder)
    found = {}
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        shape, step = tensors[f"{stem}_shape"], tensors[f"{stem}_scale"]
        assert step.shape[1] * group == int(shape[1])
        codes = unpack_from_int32(tensors[name], bits, torch.Size(shape.tolist()))
        zero = unpack_from_int32(tensors[f"{stem}_zero_point"], bits, step.shape, packed_dim=0)
        offset = codes.int() - zero.int().repeat_interleave(group, 1)
        found[stem] = offset.to(step.dtype) * step.repeat_interleave(group, 1)
    return found


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(2, torch.bfloat16), (3, torch.bfloat16), (4, torch.float32), (4, torch.float16)],
)
def test_transformers_reads_what_was_stored(
    grids: dict[int, Path], tmp_path: Path, bits: int, dtype: torch.dtype
) -> None:
    report = export_packed(grids[bits], tmp_path / "out")
    model = load_with_transformers(tmp_path / "out", dtype)
    stored, ours = stored_weights(tmp_path / "out", bits, 32), decoded(grids[bits])
    assert set(stored) == set(ours)
    apart = weights = 0
    for name, weight in stored.items():
        found = model.get_parameter(name)
        assert torch.equal(found, weight.to(dtype)), name  # bit for bit
        assert float((weight - ours[name]).abs().max()) <= 2.0**-22 * float(ours[name].abs().max())
        apart += int((found != ours[name].to(dtype)).sum())
        weights += found.numel()
    # Two float32 numbers a unit apart seldom lie on either side of a rounding boundary.
    if dtype != torch.float32:
        assert apart <= (2e-5 if dtype == torch.bfloat16 else 2e-4) * weights
    assert report.changed_codes == 0
    assert all(found.exact for found in report.storages)
    assert report.largest_relative < 2.0**-22


def test_logits_are_ours(on_grid: Path, tmp_path: Path) -> None:
    export_packed(on_grid, tmp_path / "out")
    ours = our_logits(on_grid)
    with torch.no_grad():
        found = load_with_transformers(tmp_path / "out", torch.float32)(tokens()).logits[0]
    assert float((found - ours).abs().max()) < 1e-5 * float(ours.abs().max())


def test_rounded_scales_cost_what_is_reported(on_grid: Path, tmp_path: Path) -> None:
    report = export_packed(on_grid, tmp_path / "out", dtype="bfloat16")
    stored, ours = stored_weights(tmp_path / "out", 4, 32), decoded(on_grid)
    tensors = read_tensors(tmp_path / "out")
    scales = [tensor for name, tensor in tensors.items() if name.endswith("_scale")]
    assert {tensor.dtype for tensor in scales} == {torch.bfloat16}
    largest = max(float((stored[n].float() - ours[n]).abs().max()) for n in ours)
    assert 0 < report.largest <= largest * 1.5
    assert report.relative_error < 1e-5


def test_tiles_and_shards_change_no_byte(on_grid: Path, tmp_path: Path) -> None:
    export_packed(on_grid, tmp_path / "one")
    export_packed(on_grid, tmp_path / "many", max_shard_bytes=60_000, tile_weights=3000)
    one, many = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)
    load_with_transformers(tmp_path / "many", torch.float32)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_that_fill_no_words(tmp_path: Path, bits: int) -> None:
    """37 rows of zero points, 16 columns a group: neither ends with a word."""
    from irq_convert.artifact.contents import open_artifact

    source = save_model(
        tmp_path / "source", intermediate_size=37 * 16, hidden_size=48, head_dim=12, dtype="float32"
    )
    artifact = put_on_grid(quantized(source, tmp_path / "irq", f"int{bits}", block_size=16))
    export_packed(artifact, tmp_path / "out", tile_weights=1000)
    model = load_with_transformers(tmp_path / "out", torch.float32)
    ours = decoded(artifact)
    assert any(tensor.shape.cols % 32 for tensor in open_artifact(artifact).quantized)
    for name, weight in ours.items():
        found = model.get_parameter(name)
        assert torch.allclose(found, weight, rtol=0, atol=2.0**-22 * float(weight.abs().max()))


def test_columns_that_no_group_divides_stay_dense(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", intermediate_size=344, dtype="float32")
    artifact = put_on_grid(quantized(source, tmp_path / "irq"))
    report = export_packed(artifact, tmp_path / "out")
    assert [(s.stored, s.tensors, s.exact) for s in report.storages] == [
        ("dense float32", 2, True),
        ("4 bit, group 32, scales float32", 12, True),
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == [
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    model = load_with_transformers(tmp_path / "out", torch.float32)
    with torch.no_grad():
        ours = our_logits(artifact)
        assert torch.allclose(model(tokens()).logits[0], ours, atol=1e-5 * float(ours.abs().max()))


def test_two_widths_are_two_groups(llama: Path, tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    options = QuantizeOptions(QuantSpec("int4", 32), threads=1, bits_for=(("q_proj", 3),))
    quantize(str(llama), tmp_path / "irq", options)
    artifact = put_on_grid(tmp_path / "irq")
    report = export_packed(artifact, tmp_path / "out")
    assert "transformers 5.23 reads one only" in report.notes[0]
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    raw.pop("dequantize")
    config = QuantizationConfig.model_validate(raw)
    tensors, ours, seen = read_tensors(tmp_path / "out"), decoded(artifact), set()
    for scheme in config.config_groups.values():
        for module in scheme.targets:
            parts = {
                name.removeprefix(f"{module}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{module}.")
            }
            found = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
            wanted = ours[f"{module}.weight"]
            assert torch.allclose(found, wanted, rtol=0, atol=2.0**-22 * float(wanted.abs().max()))
            seen.add((module, scheme.weights.num_bits))
    assert len(seen) == len(ours)
    assert {bits for module, bits in seen if "q_proj" in module} == {3}


def test_float_zero_points_are_refused(int4: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"blocks have a zero point.*--refit"):
        export_packed(int4, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_block_off_the_grid_is_found(on_grid: Path, tmp_path: Path) -> None:
    from tests.folders import change_tensors

    artifact = tmp_path / "irq"
    shutil.copytree(on_grid, artifact)

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tau = tensors["model.layers.1.mlp.up_proj.weight_tau"]
        tau[3, 2] = torch.nextafter(tau[3, 2], torch.tensor(2.0))

    change_tensors(artifact, nudge)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 of 1408 blocks"):
        export_packed(artifact, tmp_path / "out")
    report = export_packed(artifact, tmp_path / "out", refit=True)
    assert report.changed_codes == 0
    assert report.largest_relative < 1e-6
    assert [s.tensors for s in report.storages if not s.exact] == [1]


@pytest.mark.parametrize(("codebook", "loss"), [("int4", 0.01), ("int2", 0.2), ("nf4", 0.03)])
def test_refitting_prints_its_loss(
    llama: Path, nf4: Path, by_bits: dict[int, Path], tmp_path: Path, codebook: str, loss: float
) -> None:
    artifact = nf4 if codebook == "nf4" else by_bits[int(codebook[-1])]
    bits, group = int(codebook[-1]), 32
    report = export_packed(artifact, tmp_path / "out", refit=True)
    assert 0 < report.relative_error < loss
    assert not any(found.exact for found in report.storages)
    stored, ours = stored_weights(tmp_path / "out", bits, group), decoded(artifact)
    error = sum(float((stored[n].double() - ours[n]).square().sum()) for n in ours)
    energy = sum(float(ours[n].double().square().sum()) for n in ours)
    assert report.relative_error == pytest.approx(error / energy, rel=1e-4)


def test_nf_is_refused(nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"codebook nf4.*--zero-point integer, or add --refit"):
        export_packed(nf4, tmp_path / "out")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_words_are_those_of_the_package(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 1 << bits, (5, 77), dtype=torch.uint8)
    signed = (codes.int() - (1 << bits) // 2).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(signed, bits))
    down = pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(pack_words(codes.T.contiguous(), bits).T, down)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integer_zero_points_of_the_search_are_exact(
    llama: Path, tmp_path: Path, bits: int
) -> None:
    spec = QuantSpec(f"int{bits}", 64, zero_point="integer")
    quantize(str(llama), tmp_path / "irq", QuantizeOptions(spec, threads=1))
    report = export_packed(tmp_path / "irq", tmp_path / "out")
    assert report.changed_codes == 0
    assert report.largest_relative < 2.0**-22
    assert all(found.exact for found in report.storages)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_families(tmp_path: Path, family: str) -> None:
    """Biases and a tied head, too."""
    source = save_model(tmp_path / "source", family, tie_word_embeddings=family == "qwen2")
    artifact = put_on_grid(quantized(source, tmp_path / "irq"))
    export_packed(artifact, tmp_path / "out")
    ours = our_logits(artifact)
    with torch.no_grad():
        found = load_with_transformers(tmp_path / "out", torch.float32)(tokens()).logits[0]
    assert float((found - ours).abs().max()) < 1e-5 * float(ours.abs().max())
