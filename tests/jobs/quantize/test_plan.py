"""The plan: every tensor's fate, exact sizes, and sources that must be refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.artifact.config import QuantizationConfig, module_name
from irq_convert.artifact.results import MARKS
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import QuantizePlan, plan_quantize
from irq_convert.jobs.quantize.quantize import quantize
from tests.formats import numpy_reader
from tests.tiny import LLAMA, OTHER_FILES, UNKNOWN, llama_tensors, tiny_config, write_source

from .models import is_linear, open_meta

DOWN = "model.layers.0.mlp.down_proj"


def plan_of(folder: Path, **options: Any) -> QuantizePlan:
    return plan_quantize(open_checkpoint(folder), QuantizeOptions(**options))


def refused(folder: Path, kind: type[IrqError], *words: str, **options: Any) -> None:
    with pytest.raises(IrqError) as caught:
        plan_of(folder, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_notes_of_a_dense_result_are_not_carried_over(tmp_path: Path) -> None:
    """An artifact with them would be taken for the merged or exported model that was its source."""
    marks = dict.fromkeys(MARKS, "{}")
    source = write_source(tmp_path / "m", llama_tensors(), files={"more.txt": "kept"} | marks)
    assert set(plan_of(source).folder.carried) == {"more.txt"}


def test_every_tensor_is_accounted_for_once(tmp_path: Path) -> None:
    tensors = llama_tensors() | {
        "steps": torch.tensor(7),
        "mask": torch.zeros(3, 5, dtype=torch.bool),
        "nothing": torch.zeros(0, 4),
    }
    plan = plan_of(write_source(tmp_path / "m", tensors, shards=3), max_shard_bytes=30_000)
    names = [tensor.info.name for tensor in plan.folder.tensors]
    assert sorted(names) == sorted(tensors)
    assert {t.info.name for t in plan.quantized} == {name for name in tensors if is_linear(name)}
    outputs = [spec.name for shard in plan.folder.shards for spec in shard.outputs]
    assert len(set(outputs)) == len(outputs)
    assert plan.weights == sum(t.numel() for t in tensors.values())
    assert plan.quantized_weights == sum(t.numel() for n, t in tensors.items() if is_linear(n))
    assert plan.decided_by == "the class LlamaForCausalLM"
    assert len(plan.folder.shards) > 1
    index = plan.folder.index
    assert index is not None
    assert sorted(index["weight_map"]) == sorted(outputs)  # type: ignore[call-overload]


def test_parts_stay_together_and_shards_in_order(tmp_path: Path) -> None:
    plan = plan_of(write_source(tmp_path / "m"), max_shard_bytes=1)
    count = len(plan.folder.tensors)
    assert len(plan.folder.shards) == count  # a tensor larger than a shard gets its own
    assert plan.folder.shards[0].name == f"model-00001-of-{count:05d}.safetensors"
    order = list(open_checkpoint(tmp_path / "m").tensors)
    assert [tensor.info.name for tensor in plan.folder.tensors] == order


def test_bits_for_and_keep(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m")
    plan = plan_of(
        source,
        spec=QuantSpec("int3"),
        keep=("layers.1.*up_proj",),
        bits_for=(("mlp", 2), ("down_proj", 4), (r"layers\.1\..*q_proj", 3)),
    )
    chosen = {t.info.name: t.spec.codebook if t.spec else None for t in plan.folder.tensors}
    assert chosen[f"{DOWN}.weight"] == "int4"  # the last match wins
    assert chosen["model.layers.0.mlp.up_proj.weight"] == "int2"
    assert chosen["model.layers.1.mlp.up_proj.weight"] is None
    assert chosen["model.layers.0.self_attn.q_proj.weight"] == "int3"
    assert chosen["model.norm.weight"] is None
    config = plan.config.to_dict()
    assert "model.layers.1.mlp.up_proj" in config["modules_to_not_convert"]
    # int4 fits two columns into a byte, so the formula finds 172; int3 would not.
    assert config["overrides"][DOWN] == {"codebook": "int4", "bits": 4}
    assert "model.layers.1.self_attn.q_proj" not in config["overrides"]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [16, 17, 63, 64, 65, 100, 101, 102, 103, 171, 172, 173])
def test_columns_are_told_exactly_where_the_formula_is_wrong(
    tmp_path: Path, columns: int, bits: int
) -> None:
    shapes = {"layers.0.w.weight": (32, columns)}
    checkpoint = open_meta(tmp_path / "m", UNKNOWN, shapes)
    plan = plan_quantize(checkpoint, QuantizeOptions(QuantSpec(f"nf{bits}")))
    config = plan.config.to_dict()
    row_bytes = -(-columns * bits // 8)
    wrong = 8 * row_bytes // bits != columns
    assert config["overrides"] == ({"layers.0.w": {"columns": columns}} if wrong else {})
    assert QuantizationConfig.from_dict(config) == plan.config
    assert numpy_reader.check_config(config).layout("layers.0.w.weight").codebook == f"nf{bits}"


def test_modules_to_not_convert_covers_every_linear_left(tmp_path: Path) -> None:
    """What a loader that swaps layers will find: each linear of the class is one or the other."""
    import transformers

    plan = plan_of(write_source(tmp_path / "m"), keep=(r"layers\.0\.mlp", "v_proj"))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny_config())
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantized = {module_name(t.info.name) for t in plan.quantized}
    assert quantized == {n for n in linears if not ("layers.0.mlp" in n or "v_proj" in n)} - {
        "lm_head"
    }
    assert set(plan.config.modules_to_not_convert) == linears - quantized


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@settings(max_examples=25)
@given(
    shapes=st.lists(st.tuples(st.integers(16, 90), st.integers(16, 200)), min_size=1, max_size=4),
    copied=st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=3),
    dtype=st.sampled_from(sorted(DTYPES)),
    bits=st.sampled_from([2, 3, 4]),
    block_size=st.sampled_from([16, 32, 64, 128]),
    max_shard_bytes=st.sampled_from([1, 5000, 20_000, 10**9]),
    architecture=st.sampled_from(["Größe", "plain", "\ud800"]),
)
def test_bytes_of_the_plan_are_those_on_disk(
    shapes: list[tuple[int, int]],
    copied: list[list[int]],
    dtype: str,
    bits: int,
    block_size: int,
    max_shard_bytes: int,
    architecture: str,
) -> None:
    tensors = {
        f"layers.{n}.w.weight": torch.zeros(shape, dtype=DTYPES[dtype])
        for n, shape in enumerate(shapes)
    }
    tensors |= {f"extra.{n}": torch.zeros(shape) for n, shape in enumerate(copied)}
    options = QuantizeOptions(
        QuantSpec(f"nf{bits}", block_size), max_shard_bytes=max_shard_bytes, threads=1
    )
    config = UNKNOWN | {"architectures": [architecture], "limit": [0.0, float("inf")]}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in"), Path(folder, "out")
        write_source(source, tensors, config)
        plan = plan_quantize(open_checkpoint(source), options)
        report = quantize(str(source), out, options)
        sizes = {p.relative_to(out).as_posix(): p.stat().st_size for p in out.rglob("*.*")}
        sizes |= {"empty": (out / "empty").stat().st_size}
        for shard in plan.folder.shards:
            assert sizes[shard.name] == shard.nbytes
        written = sum(v for name, v in sizes.items() if (out / name).is_file())
        manifest = sizes["irq_manifest.json"]
        assert written == plan.folder.bytes_out + manifest == report.bytes_out
        assert plan.folder.bytes_out + manifest <= plan.bytes_needed
        assert report.bytes_in == plan.bytes_in
        assert json.loads((out / "config.json").read_text())["limit"] == [0.0, float("inf")]


def test_config_keeps_every_key_in_order(tmp_path: Path) -> None:
    config = LLAMA | {"ünï": "ö", "nested": {"a": [1, 2.5, None]}, "eps": 1e-05, "big": 2**70}
    plan = plan_of(write_source(tmp_path / "m", None, config))
    written = json.loads(plan.folder.documents["config.json"])
    assert list(written) == [*config, "quantization_config"]
    assert {k: v for k, v in written.items() if k != "quantization_config"} == config


def test_a_source_without_config(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m", {"h.0.fc.weight": torch.zeros(32, 64)})
    (source / "config.json").unlink()
    refused(source, IrqError, str(source), "no config.json", "copy")


def test_files_are_carried_but_for_those_that_are_written_anew(tmp_path: Path) -> None:
    files = OTHER_FILES | {"irq_manifest.json": "{}", "sub/irq_manifest.json": "{}"}
    files |= {"sub/config.json": "{}", "pytorch_model.bin": "x", ".hidden": "y", ".git/x": "z"}
    plan = plan_of(write_source(tmp_path / "m", files=files, shards=2))
    kept = {*OTHER_FILES, "sub/irq_manifest.json", "sub/config.json", ".hidden"}
    assert set(plan.folder.carried) == kept
    assert sum(plan.folder.carried_sizes.values()) == sum(len(files[name]) for name in kept)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    ],
)
def test_quantized_sources_are_refused(tmp_path: Path, config: dict[str, object]) -> None:
    source = write_source(tmp_path / "m", None, LLAMA | config)
    refused(source, IrqError, "already quantized", "'gptq'", "original model")


@pytest.mark.parametrize("config", [{"quantization_config": None}, {"quantization_config": {}}])
def test_an_empty_quantization_config_is_none(tmp_path: Path, config: dict[str, object]) -> None:
    plan = plan_of(write_source(tmp_path / "m", None, LLAMA | config))
    assert json.loads(plan.folder.documents["config.json"])["quantization_config"]["bits"] == 4


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8")],
)
def test_linears_in_narrow_dtypes_are_refused(
    tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    tensors = llama_tensors()
    tensors[f"{DOWN}.weight"] = torch.zeros(96, 172).to(dtype)
    refused(
        write_source(tmp_path / "m", tensors),
        IrqError,
        f"{DOWN}.weight [96, 172]",
        name,
        "already quantized",
        "model.safetensors",
    )


@pytest.mark.parametrize("part", ["_scale", "_tau", "_scale_grid", "_tau_grid"])
def test_names_that_would_collide_are_refused(tmp_path: Path, part: str) -> None:
    tensors = llama_tensors() | {f"{DOWN}.weight{part}": torch.zeros(3)}
    source = write_source(tmp_path / "m", tensors)
    refused(source, IrqError, f"{DOWN}.weight{part}", "--keep")
    assert plan_of(source, keep=("down_proj",)).quantized


def test_copied_bytes_that_look_like_codes_are_refused(tmp_path: Path) -> None:
    tensors = llama_tensors() | {
        "experts": torch.zeros(4, 4, dtype=torch.uint8),
        "experts_scale": torch.zeros(4),
    }
    refused(write_source(tmp_path / "m", tensors), IrqError, "experts", "experts_scale", "U8")


def test_expressions_that_match_nothing_are_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m")
    refused(source, UsageError, "--keep", "'nope'", DOWN, keep=("q_proj", "nope"))
    refused(source, UsageError, "--bits-for", "'nope'", DOWN, bits_for=(("nope", 4),))
    refused(source, UsageError, "--keep", "embed_tokens.weight", "any case", keep=("embed",))


def test_nothing_to_quantize_is_refused(tmp_path: Path) -> None:
    tensors = {"norm.weight": torch.zeros(8)}
    source = write_source(tmp_path / "a", tensors, UNKNOWN)
    refused(source, IrqError, "nothing to quantize", "names and shapes")
    refused(write_source(tmp_path / "b"), IrqError, "nothing to quantize", keep=("proj",))
