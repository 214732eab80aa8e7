"""Which sources are decoded, what is left of their names, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from irq_convert.checkpoint.fp8_sources import ACTIVATIONS, CACHE
from irq_convert.checkpoint.header import header_length
from irq_convert.checkpoint.source import Checkpoint, open_checkpoint
from irq_convert.errors import IrqError
from tests.folders import assert_one_line
from tests.tiny import write_source

from .narrow import BLOCKS, CHANNELS, FBGEMM, MODELOPT, MODULES, Tensors, random_bytes

F8 = torch.float8_e4m3fn
UP, DOWN = "m.up_proj.weight", "m.down_proj.weight"
STACK = "m.experts.gate_up_proj"


def fp8_tensors() -> Tensors:
    return {
        "m.norm.weight": torch.ones(8),
        UP: torch.ones(20, 24).to(F8),
        f"{UP}_scale_inv": torch.ones(2, 3),
        DOWN: torch.ones(24, 20).to(F8),
        f"{DOWN}_scale_inv": torch.ones(2, 3),
        "m.head.weight": torch.ones(4, 8, dtype=torch.bfloat16),
    }


def mxfp4_tensors() -> Tensors:
    return {
        f"{STACK}_blocks": random_bytes((2, 6, 3, 16), 0, 256),
        f"{STACK}_scales": random_bytes((2, 6, 3), 120, 130),
        f"{STACK}_bias": torch.ones(2, 6),
    }


def opened(
    folder: Path, tensors: Tensors, setting: Any, shards: int = 1, **config: Any
) -> Checkpoint:
    raw = {"model_type": "x", "quantization_config": setting, **config}
    return open_checkpoint(write_source(folder / "m", tensors, raw, shards, files={}))


def test_fp8_weights_stand_where_they_stood_and_scales_are_gone(tmp_path: Path) -> None:
    found = opened(tmp_path, fp8_tensors(), BLOCKS, shards=2, torch_dtype="float16")
    plain = open_checkpoint(
        write_source(tmp_path / "n", fp8_tensors(), {"model_type": "x"}, 2, files={})
    )
    assert list(found.tensors) == [n for n in plain.tensors if not n.endswith("_scale_inv")]
    assert found.config == {"model_type": "x", "torch_dtype": "float16"}
    assert found.dropped == ()
    info = found.tensors[UP]
    assert (info.name, info.dtype, info.shape, info.nbytes) == (UP, "F16", (20, 24), 960)
    assert info.shard.name != plain.tensors[f"{UP}_scale_inv"].shard.name
    assert {path.name for path in info.files} == {path.name for path in found.shards}
    assert found.tensors["m.head.weight"].lazy is None


def test_mxfp4_gets_the_name_and_the_layout_of_the_class(tmp_path: Path) -> None:
    found = opened(tmp_path, mxfp4_tensors(), MODULES, shards=2, dtype="bfloat16")
    assert sorted(found.tensors) == [STACK, f"{STACK}_bias"]
    info = found.tensors[STACK]
    assert (info.name, info.dtype, info.shape, info.nbytes) == (STACK, "BF16", (2, 96, 6), 2304)
    assert [path.name for path in info.files] == [path.name for path in found.shards]
    assert found.config == {"model_type": "x", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, "BF16"),
        ({"dtype": "float32"}, "F32"),
        ({"torch_dtype": "torch.float16"}, "F16"),
        ({"dtype": None, "torch_dtype": "auto", "text_config": {"dtype": "float16"}}, "F16"),
        ({"dtype": "float8_e4m3fn"}, "BF16"),
        ({"torch_dtype": "bfloat16", "text_config": {"dtype": "float32"}}, "BF16"),
    ],
)
def test_the_dtype_is_that_of_config_json(tmp_path: Path, config: Any, dtype: str) -> None:
    assert opened(tmp_path, fp8_tensors(), BLOCKS, **config).tensors[UP].dtype == dtype


def test_a_setting_in_the_text_model_counts_and_goes(tmp_path: Path) -> None:
    nested: dict[str, Any] = {"text_config": {"hidden": 8, "quantization_config": BLOCKS}}
    found = opened(tmp_path / "a", fp8_tensors(), None, **nested)
    assert found.tensors[UP].dtype == "BF16"
    assert found.config == {"model_type": "x", "text_config": {"hidden": 8}}
    found = opened(tmp_path / "b", fp8_tensors(), BLOCKS, **nested)
    assert found.config == {"model_type": "x", "text_config": {"hidden": 8}}
    found = opened(tmp_path / "c", fp8_tensors(), MODELOPT, **nested)
    assert found.tensors[UP].dtype == "F8_E4M3"


def test_what_a_dense_model_does_not_need_is_dropped_by_name(tmp_path: Path) -> None:
    one = torch.ones(())
    away = {
        "m.down_proj.input_scale": ACTIVATIONS,
        "m.up_proj.activation_scale": ACTIVATIONS,
        "m.up_proj.input_scale_ub": ACTIVATIONS,
        "m.self_attn.k_proj.k_scale": CACHE,
        "m.self_attn.v_scale": CACHE,
    }
    stays = {"clip.input_scale": one, "clip.scale": one.clone(), "clip.k_scale": torch.ones(3)}
    tensors = fp8_tensors() | {name: one.clone() for name in away}
    found = opened(tmp_path / "a", tensors | stays, BLOCKS)
    assert dict(found.dropped) == away
    assert set(found.tensors) == {"m.norm.weight", UP, DOWN, "m.head.weight", *stays}
    scheme = BLOCKS | {"kv_cache_scheme": {"num_bits": 8}}
    heads = {"m.self_attn.k_scale": torch.ones(4, 1, 1)}
    found = opened(tmp_path / "b", fp8_tensors() | heads, scheme)
    assert dict(found.dropped) == {"m.self_attn.k_scale": CACHE}


def test_the_file_of_modelopt_is_not_carried_over(tmp_path: Path) -> None:
    tensors = {UP: torch.ones(4, 4).to(F8), f"{UP}_scale": torch.ones(())}
    for name, inner in (("flat", MODELOPT), ("nested", {"quantization": MODELOPT})):
        setting: dict[str, Any] = {"quant_method": "modelopt", **inner}
        config = {"quantization_config": setting}
        files = {"hf_quant_config.json": "{}", "notes.txt": ""}
        source = write_source(tmp_path / name, tensors, config, files=files)
        found = open_checkpoint(source)
        assert found.tensors[UP].dtype == "BF16"
        assert found.other_files == ("config.json", "notes.txt")


def group(**weights: Any) -> dict[str, Any]:
    setting = json.loads(json.dumps(CHANNELS))
    setting["config_groups"]["group_0"]["weights"] |= weights
    return setting


@pytest.mark.parametrize(
    ("weights", "shape"),
    [
        ({"strategy": "block", "block_structure": [16, 8]}, (2, 3)),
        ({"strategy": "group", "group_size": 8}, (20, 3)),
        ({"strategy": "channel"}, (20, 1)),
        ({"strategy": "tensor"}, (1,)),
    ],
)
def test_strategies_of_compressed_tensors(
    tmp_path: Path, weights: dict[str, Any], shape: tuple[int, ...]
) -> None:
    tensors = {UP: torch.ones(20, 24).to(F8), f"{UP}_scale": torch.ones(shape)}
    assert opened(tmp_path, tensors, group(**weights)).tensors[UP].dtype == "BF16"


I8 = torch.ones(4, 4, dtype=torch.int8)
MIXED = CHANNELS | {
    "config_groups": {
        "a": CHANNELS["config_groups"]["group_0"],
        "b": {"weights": {"num_bits": 4, "type": "int"}, "format": "pack-quantized"},
    }
}


@pytest.mark.parametrize(
    ("setting", "more"),
    [
        (None, {}),
        ({"quant_method": "irq"}, {}),
        ({"quant_method": "gptq", "bits": 4}, {}),
        ({"quant_method": "quark"}, {}),
        (BLOCKS | {"expert_dtype": "fp4"}, {}),
        (BLOCKS | {"weight_block_size": [128]}, {}),
        (BLOCKS, {"m.experts.weight": I8, "m.experts.scale": torch.ones(4, 4)}),
        (BLOCKS, {"m.x.weight": torch.ones(4, 4).to(torch.float8_e4m3fnuz)}),
        (MODELOPT | {"quant_algo": "NVFP4"}, {}),
        (MODELOPT | {"quant_algo": "MIXED_PRECISION"}, {}),
        (MODELOPT, {"m.x.weight": I8, "m.x.weight_scale_2": torch.ones(1)}),
        (group(type="int"), {}),
        (group(num_bits=4), {}),
        (group(symmetric=False), {}),
        (CHANNELS | {"format": "mxfp8-quantized"}, {}),
        (CHANNELS | {"transform_config": {"config_groups": {"u": {}}}}, {}),
        (CHANNELS | {"sparsity_config": {"format": "sparse-24-bitmask"}}, {}),
        (CHANNELS, {"m.x.weight_zero_point": torch.ones(4, 1)}),
        (MIXED, {}),
    ],
)
def test_everything_else_is_left_as_it_is(tmp_path: Path, setting: Any, more: Tensors) -> None:
    found = opened(tmp_path, fp8_tensors() | more, setting)
    assert set(found.tensors) == {*fp8_tensors(), *more}
    assert all(info.lazy is None for info in found.tensors.values())
    assert found.config == {"model_type": "x", "quantization_config": setting}


@pytest.mark.parametrize("setting", [BLOCKS, CHANNELS, FBGEMM, MODELOPT, MODULES])
def test_a_dense_model_with_a_setting_is_left_as_it_is(tmp_path: Path, setting: Any) -> None:
    found = opened(tmp_path, {"a.weight": torch.ones(4, 4)}, setting)
    assert found.config is not None
    assert found.config["quantization_config"] == setting


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


U8 = random_bytes((2, 6, 2), 120, 130)


@pytest.mark.parametrize(
    ("setting", "change", "words"),
    [
        (BLOCKS, without(f"{UP}_scale_inv"), [UP, "[20, 24]", "F8_E4M3", "without its scale"]),
        (BLOCKS, without(UP), [f"{UP}_scale_inv [2, 3]", "no tensor of F8_E4M3"]),
        (BLOCKS, put(UP, torch.ones(20, 24)), [f"{UP}_scale_inv", "no tensor of F8_E4M3"]),
        (BLOCKS, put(f"{UP}_scale", torch.ones(1)), [f"{UP}_scale [1]", "get all files"]),
        (
            BLOCKS,
            put(f"{UP}_scale_inv", torch.ones(3, 2)),
            [
                "F32 [3, 2]",
                f"{UP} [20, 24]",
                "or [20, 1]",
                "[2, 3] for blocks of [16, 8]",
                "config.json",
            ],
        ),
        (BLOCKS, put(f"{UP}_scale_inv", torch.ones(2, 3, dtype=torch.int32)), ["I32 [2, 3]"]),
        (BLOCKS, put(f"{DOWN}_scale_inv", torch.ones(3, 1)), ["F32 [3, 1]", f"{DOWN} [24, 20]"]),
        (BLOCKS, put(f"{DOWN}_scale_inv", torch.ones(1, 5)), ["F32 [1, 5]", f"{DOWN} [24, 20]"]),
        (BLOCKS, put(f"{UP}_scale_inv", torch.ones(0)), ["F32 [0]", "does not fit"]),
        (
            CHANNELS,
            without("m.norm.weight"),
            ["F32 [2, 3]", "one number or [24, 1], in one of F32"],
        ),
        (MODULES, without(f"{STACK}_scales"), [f"{STACK}_blocks [2, 6, 3, 16]", "one half"]),
        (MODULES, without(f"{STACK}_blocks"), [f"{STACK}_scales", "_blocks is in no file"]),
        (MODULES, put(f"{STACK}_scales", U8), ["U8 [2, 6, 2]", "need U8 [2, 6, 3]"]),
        (MODULES, put(f"{STACK}_blocks", U8), [f"{STACK}_blocks is [2, 6, 2]", "MXFP4 has"]),
        (MODULES, put(STACK, torch.ones(1)), [f"beside {STACK}", "keep one"]),
    ],
)
def test_a_damaged_source_is_refused_in_one_line(
    tmp_path: Path, setting: Any, change: Callable[[Tensors], object], words: list[str]
) -> None:
    tensors = mxfp4_tensors() if setting is MODULES else fp8_tensors()
    change(tensors)
    with pytest.raises(IrqError) as error:
        opened(tmp_path, tensors, setting)
    assert_one_line(str(error.value), "model.safetensors", *words)


@pytest.mark.parametrize(
    ("tensors", "setting"), [(fp8_tensors(), BLOCKS), (mxfp4_tensors(), MODULES)]
)
def test_headers_alone_are_enough(tmp_path: Path, tensors: Tensors, setting: Any) -> None:
    whole = opened(tmp_path, tensors, setting)
    (shard,) = whole.shards
    data = shard.read_bytes()
    shard.write_bytes(data[: 8 + header_length(shard, data)])
    sizes = json.dumps({shard.name: len(data)})
    (whole.folder / ".headers-only.json").write_text(sizes)
    assert open_checkpoint(whole.folder).tensors == whole.tensors
