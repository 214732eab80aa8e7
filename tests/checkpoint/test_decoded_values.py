"""FP8 and MXFP4 as dense tensors: equal to the bit to the loaders of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from irq_convert.checkpoint.source import open_checkpoint
from tests.folders import read_tensors
from tests.tiny import LLAMA, llama_tensors, tiny_model, write_source

from .narrow import (
    BLOCKS,
    CHANNELS,
    FBGEMM,
    MODELOPT,
    MODULES,
    Tensors,
    assert_same,
    decoded,
    expanded,
    in_fp8,
    in_mxfp4,
    linear_names,
    random_bytes,
    to_fp8,
)

DEEPSEEK: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
GPT_OSS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}


def saved(folder: Path, family: str, dtype: str, **changes: Any) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and config.json of a tiny model as transformers saves it."""
    tiny_model(family, dtype=getattr(torch, dtype), **changes).save_pretrained(folder)
    return read_tensors(folder), json.loads((folder / "config.json").read_text())


def assert_loads_the_same(source: Path, dtype: str, setting: Any) -> None:
    """Transformers' own loader makes of `source` what it makes of the tensors that we read."""
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(source)
    twin = write_source(source.with_name("twin"), decoded(source), checkpoint.config, files={})
    wanted = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=setting, dtype=getattr(torch, dtype)
    ).state_dict()
    found = AutoModelForCausalLM.from_pretrained(twin, dtype=getattr(torch, dtype)).state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert_same(tensor, wanted[name], name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fp8_of_blocks_as_transformers_loads_it(tmp_path: Path, dtype: str) -> None:
    from transformers import FineGrainedFP8Config

    tensors, config = saved(tmp_path / "dense", "deepseek_v3", dtype, **DEEPSEEK)
    config["quantization_config"] = BLOCKS
    source = write_source(tmp_path / "m", in_fp8(tensors), config, shards=3, files={})
    assert_loads_the_same(
        source, dtype, FineGrainedFP8Config(weight_block_size=(16, 8), dequantize=True)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_as_transformers_loads_it(tmp_path: Path, dtype: str) -> None:
    from transformers.utils.quantization_config import Mxfp4Config

    tensors, config = saved(tmp_path / "dense", "gpt_oss", dtype, **GPT_OSS)
    config["quantization_config"] = MODULES
    source = write_source(tmp_path / "m", in_mxfp4(tensors), config, shards=3, files={})
    assert_loads_the_same(source, dtype, Mxfp4Config(dequantize=True))


@pytest.mark.filterwarnings("ignore:You passed .quantization_config")
@pytest.mark.parametrize(
    ("strategy", "scale_dtype"),
    [
        ("channel", torch.float32),
        ("channel", torch.bfloat16),
        ("tensor", torch.float32),
        ("tensor", torch.bfloat16),
    ],
)
def test_fp8_of_compressed_tensors_as_transformers_loads_it(
    tmp_path: Path, strategy: str, scale_dtype: torch.dtype
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers.utils.quantization_config import CompressedTensorsConfig

    setting = json.loads(json.dumps(CHANNELS))
    setting["config_groups"]["group_0"]["weights"]["strategy"] = strategy
    tensors = llama_tensors(torch.bfloat16)
    for name in linear_names(tensors):
        rows, cols = tensors[name].shape
        block = (1, cols) if strategy == "channel" else (rows, cols)
        tensors[name], scale = to_fp8(tensors[name], block)
        tensors[f"{name}_scale"] = (scale if strategy == "channel" else scale[0]).to(scale_dtype)
    config = LLAMA | {"dtype": "bfloat16", "quantization_config": setting}
    source = write_source(tmp_path / "m", tensors, config, files={})
    asked = CompressedTensorsConfig(**setting, dequantize=True)
    assert_loads_the_same(source, "bfloat16", asked)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(48, 40), (3, 32, 24)])
def test_every_code_and_kind_of_scale(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    """Against the operation of transformers' loader alone, with all 256 codes."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.arange(48 * 48)[: torch.Size(shape).numel()].to(torch.uint8).view(dtype)
    weight = weight.view(shape)
    exponents = random_bytes((*shape[:-2], shape[-2] // 16, shape[-1] // 8), 100, 140)
    scale = exponents.view(scale_dtype) if scale_dtype.itemsize == 1 else exponents.float() / 977
    name = "experts.up_proj" if len(shape) == 3 else "up_proj.weight"
    tensors = {name: weight, f"{name}_scale_inv": scale}
    source = write_source(tmp_path / "m", tensors, {"quantization_config": BLOCKS}, files={})
    wanted = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert_same(decoded(source)[name].nan_to_num(), wanted.nan_to_num())


SETTINGS = [
    (MODELOPT, "_scale", (), None),
    (MODELOPT, "_scale", (96,), (1, 96)),
    (FBGEMM, "_scale", (96, 1), (1, 96)),
    (CHANNELS, "_scale", (96, 1), (1, 96)),
    (CHANNELS, "_scale", (1,), None),
    (BLOCKS | {"weight_block_size": None}, "_scale_inv", (), None),
    (BLOCKS | {"weight_block_size": [128, 128]}, "_scale_inv", (1, 1), None),
    (BLOCKS | {"weight_block_size": [20, 36]}, "_scale_inv", (5, 3), (20, 36)),
    ({"quant_method": "fp8"}, "_scale", (1,), None),
]


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("setting", "suffix", "shape", "block"), SETTINGS)
def test_scales_by_the_formula(
    tmp_path: Path,
    setting: dict[str, Any],
    suffix: str,
    shape: tuple[int, ...],
    block: tuple[int, int] | None,
    scale_dtype: torch.dtype,
) -> None:
    name, weight = "up_proj.weight", torch.randn(96, 96).to(torch.float8_e4m3fn)
    scale = (torch.rand(shape) + 0.1).to(scale_dtype)
    tensors = {name: weight, name + suffix: scale, "norm.weight": torch.ones(3)}
    config = {"text_config": {"dtype": "float16"}, "quantization_config": setting}
    source = write_source(tmp_path / "m", tensors, config, shards=2, files={})
    grid = scale.reshape(-1, 1) if len(shape) < 2 else scale
    whole = expanded(grid, (96, 96), block or (96, 96))
    assert_same(decoded(source)[name], (weight.float() * whole).half())


def test_stacks_of_fbgemm_have_scales_of_columns(tmp_path: Path) -> None:
    weight = torch.randn(2, 6, 8).to(torch.float8_e4m3fn)
    up, down = torch.rand(2, 1, 8), torch.rand(2, 8, 1)
    tensors = {"up_proj": weight, "up_proj_scale": up, "down_proj": weight.clone()}
    tensors["down_proj_scale"] = down
    source = write_source(tmp_path / "m", tensors, {"quantization_config": FBGEMM}, files={})
    found = decoded(source)
    assert_same(found["up_proj"], (weight.float() * up).bfloat16())
    assert_same(found["down_proj"], (weight.float() * down.transpose(1, 2)).bfloat16())


def test_gate_and_up_have_a_scale_each_where_a_block_would_hold_both(tmp_path: Path) -> None:
    weight, scale = torch.randn(3, 8, 20).to(torch.float8_e4m3fn), torch.rand(3, 2, 3)
    tensors = {"gate_up_proj": weight, "gate_up_proj_scale_inv": scale}
    source = write_source(tmp_path / "m", tensors, {"quantization_config": BLOCKS}, files={})
    whole = expanded(scale, weight.shape, (4, 8))
    assert_same(decoded(source)["gate_up_proj"], (weight.float() * whole).bfloat16())
