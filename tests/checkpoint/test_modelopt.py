"""Sources of modelopt whose settings stand only in hf_quant_config.json, beside config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from irq_convert.checkpoint.fp8_sources import ACTIVATIONS, CACHE
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import IrqError
from tests.folders import assert_one_line
from tests.tiny import LLAMA, llama_tensors, write_source

from .narrow import BLOCKS, Tensors, assert_same, decoded, linear_names, random_bytes, to_fp8

FILE = "hf_quant_config.json"


def settings(algo: str | None, **more: Any) -> dict[str, Any]:
    """What modelopt writes."""
    inner = {"quant_algo": algo, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    return {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": inner | more}


def fp8_of_tensors() -> tuple[Tensors, Tensors]:
    """As modelopt names them, with scales of activations and of the cache; and the dense twin."""
    tensors = llama_tensors(torch.bfloat16)
    twin = dict(tensors)
    for name in linear_names(tensors):
        stem = name.removesuffix(".weight")
        tensors[name], scale = to_fp8(tensors[name], tuple(tensors[name].shape))
        tensors[f"{stem}.weight_scale"] = scale.reshape(())
        tensors[f"{stem}.input_scale"] = torch.tensor(0.25)
        twin[name] = (tensors[name].float() * scale).bfloat16()
    for layer in range(2):
        for letter in "kv":
            name = f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale"
            tensors[name] = torch.tensor(1.0)
    return tensors, twin


def written(folder: Path, tensors: Tensors, beside: Any, **config: Any) -> Path:
    files = {"notes.txt": ""} | ({} if beside is None else {FILE: json.dumps(beside)})
    return write_source(folder, tensors, LLAMA | {"dtype": "bfloat16"} | config, 2, files)


def test_fp8_is_the_dense_model_and_the_file_is_gone(tmp_path: Path) -> None:
    tensors, twin = fp8_of_tensors()
    source = written(tmp_path / "m", tensors, settings("FP8"))
    found = decoded(source)
    assert found.keys() == twin.keys()
    for name, tensor in found.items():
        assert_same(tensor, twin[name], name)
    opened = open_checkpoint(source)
    assert opened.encoding == "fp8-tensor"
    assert opened.config == LLAMA | {"dtype": "bfloat16"}
    assert opened.other_files == ("config.json", "notes.txt")
    assert set(dict(opened.dropped).values()) == {ACTIVATIONS, CACHE}
    assert len(opened.dropped) == 14 + 4


def test_a_scale_that_is_missing_is_named(tmp_path: Path) -> None:
    tensors, _ = fp8_of_tensors()
    name = linear_names(tensors)[0]
    del tensors[f"{name}_scale"]
    with pytest.raises(IrqError) as error:
        open_checkpoint(written(tmp_path / "m", tensors, settings("FP8")))
    assert_one_line(str(error.value), name, "without its scale")


def test_config_json_comes_first(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight, scale = to_fp8(torch.randn(32, 16), (16, 8))
    tensors = {name: weight, f"{name}_scale_inv": scale}
    source = written(tmp_path / "m", tensors, settings("NVFP4"), quantization_config=BLOCKS)
    opened = open_checkpoint(source)
    assert opened.encoding == "fp8-block"


def nvfp4(tensors: Tensors) -> None:
    for name in linear_names(tensors):
        rows, cols = tensors[name].shape
        tensors[name] = random_bytes((rows, cols // 2), 0, 256)
        tensors[f"{name}_scale"] = torch.ones(rows, cols // 16).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_2"] = torch.tensor(1.0)


def awq(tensors: Tensors) -> None:
    for name in linear_names(tensors):
        rows, cols = tensors[name].shape
        tensors[name] = random_bytes((rows // 2, cols), 0, 256)
        tensors[f"{name}_scale"] = torch.ones(rows, cols // 16)


@pytest.mark.parametrize(
    ("algo", "change"),
    [("NVFP4", nvfp4), ("W4A16_AWQ", awq), ("MIXED_PRECISION", nvfp4), ("FP8_PB_WO", None)],
)
def test_other_methods_are_refused_by_name(tmp_path: Path, algo: str, change: Any) -> None:
    from irq_convert.hf.usable import refuse_unusable

    tensors = llama_tensors(torch.bfloat16)
    if change is None:
        tensors, _ = fp8_of_tensors()
    else:
        change(tensors)
    opened = open_checkpoint(written(tmp_path / "m", tensors, settings(algo)))
    assert opened.tensors.keys() == tensors.keys()
    assert FILE in opened.other_files
    with pytest.raises(IrqError) as error:
        refuse_unusable(opened)
    assert_one_line(str(error.value), "already quantized", "'modelopt'", f"quant_algo '{algo}'")


@pytest.mark.parametrize("beside", [settings("FP8"), {}, {"quantization": None}, None])
def test_a_dense_model_is_left_as_it_is(tmp_path: Path, beside: Any) -> None:
    """Somebody has decoded it and left the file; or the file is no setting."""
    opened = open_checkpoint(written(tmp_path / "m", llama_tensors(), beside))
    assert opened.config == LLAMA | {"dtype": "bfloat16"}
    assert opened.encoding is None
    assert (FILE in opened.other_files) == (beside is not None)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    source = written(tmp_path / "m", fp8_of_tensors()[0], settings("FP8"))
    (source / FILE).write_text("{")
    with pytest.raises(IrqError) as error:
        open_checkpoint(source)
    assert_one_line(str(error.value), FILE, "not JSON")
