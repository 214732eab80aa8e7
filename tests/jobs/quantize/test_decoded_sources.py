"""Artifacts of FP8 and MXFP4 sources: byte for byte those of the dense models they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import irq_convert
from irq_convert.checkpoint.buffers import dtype_name, tensor_bytes
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.jobs.verify import verify
from tests.checkpoint.helpers import entry, raw_file
from tests.checkpoint.narrow import BLOCKS, MODULES, Tensors, decoded, in_fp8, in_mxfp4
from tests.checkpoint.test_modelopt import FILE, fp8_of_tensors, settings
from tests.folders import SHARD, listing, read_json, read_tensors
from tests.tiny import LLAMA, llama_tensors, tiny_model, write_source

GPT_OSS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}


def fp8(folder: Path) -> Path:
    config = LLAMA | {"dtype": "bfloat16", "quantization_config": BLOCKS}
    return write_source(folder, in_fp8(llama_tensors(torch.bfloat16)), config, shards=2, files={})


def modelopt(folder: Path) -> Path:
    """Its settings beside config.json, not in it."""
    config, files = LLAMA | {"dtype": "bfloat16"}, {FILE: json.dumps(settings("FP8"))}
    return write_source(folder, fp8_of_tensors()[0], config, 2, files)


def mxfp4(folder: Path) -> Path:
    plain = folder.with_name("plain")
    tiny_model("gpt_oss", dtype=torch.bfloat16, **GPT_OSS).save_pretrained(plain)
    config = read_json(plain / "config.json") | {"quantization_config": MODULES}
    return write_source(folder, in_mxfp4(read_tensors(plain)), config, shards=2, files={})


def twin_of(source: Path) -> tuple[Path, Tensors]:
    """The dense model that a source stands for, saved in the order of the source; its tensors."""
    checkpoint, tensors = open_checkpoint(source), decoded(source)
    twin = write_source(source.with_name("twin"), {}, checkpoint.config, files={})
    header, data = {}, b""
    for name, tensor in tensors.items():
        more = bytes(tensor_bytes(tensor))
        places = len(data), len(data) + len(more)
        header[name] = entry(dtype_name(tensor.dtype), list(tensor.shape), *places)
        data += more
    raw_file(twin / SHARD, header, data)
    return twin, tensors


@pytest.mark.slow
@pytest.mark.parametrize("make", [fp8, modelopt, mxfp4])
@pytest.mark.parametrize("options", [{}, {"tile_weights": 2000}, {"keep": ["layers.0"]}])
def test_the_shards_are_those_of_the_dense_model(
    tmp_path: Path, make: Any, options: dict[str, Any]
) -> None:
    source = make(tmp_path / "m")
    twin, tensors = twin_of(source)
    for folder, out in ((source, "a"), (twin, "b")):
        irq_convert.quantize(folder, tmp_path / out, block_size=32, **options)
    for name in (SHARD, "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert listing(tmp_path / "a").keys() == listing(tmp_path / "b").keys()
    assert verify(tmp_path / "a", source).failures == ()
    stacks = {name for name, tensor in tensors.items() if tensor.dim() == 3}
    packed = {name for name in stacks if f"{name}_tau" in read_tensors(tmp_path / "a")}
    assert len(stacks) == (4 if make is mxfp4 else 0)
    assert packed == {name for name in stacks if "keep" not in options or "layers.1" in name}
