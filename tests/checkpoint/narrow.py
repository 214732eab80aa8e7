"""Sources in FP8 and MXFP4 made of random numbers, and what they stand for by numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import open_checkpoint

Tensors = dict[str, torch.Tensor]
MODULES = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
BLOCKS: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [16, 8],
}
CHANNELS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            "input_activations": None,
        }
    },
    "ignore": ["lm_head"],
}
MODELOPT: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
FBGEMM = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}


def to_fp8(
    weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, or a stack of them, in FP8, and its scales, for blocks that may be cut off."""
    *lead, rows, cols = weight.shape
    high, wide = -(-rows // block[0]), -(-cols // block[1])
    padded = torch.zeros(*lead, high * block[0], wide * block[1])
    padded[..., :rows, :cols] = weight.float()
    tiles = padded.view(*lead, high, block[0], wide, block[1])
    scale = tiles.abs().amax((-3, -1)).clamp(min=1e-6) / 401
    codes = (tiles / scale[..., :, None, :, None]).to(dtype).float().view(padded.shape)
    return codes[..., :rows, :cols].to(dtype).contiguous(), scale


def linear_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name in tensors if "_proj" in name and name.endswith(".weight")]


def in_fp8(tensors: Tensors, block: tuple[int, int] = (16, 8)) -> Tensors:
    """`tensors` with all projections in FP8 of blocks, as transformers names them."""
    found: Tensors = {}
    linears = linear_names(tensors)
    for name, tensor in tensors.items():
        found[name] = tensor
        if name in linears:
            found[name], found[f"{name}_scale_inv"] = to_fp8(tensor, block)
    return found


def in_mxfp4(tensors: Tensors, seed: int = 0) -> Tensors:
    """`tensors` with stacks of experts replaced by random MXFP4 of the same shape."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32)
        found[f"{name}_blocks"] = random_bytes((*shape, 16), 0, 256, generator)
        found[f"{name}_scales"] = random_bytes(shape, 115, 124, generator)
    return found


def random_bytes(
    shape: tuple[int, ...], low: int, high: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def expanded(scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """A scale for every number of a tensor of `shape`."""
    rows, cols = shape[-2:]
    whole = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return whole[..., :rows, :cols]


def mxfp4_by_numpy(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What blocks and scales stand for, in float64, `[experts, inputs, outputs]`."""
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = blocks.numpy()
    pairs = np.stack([levels[codes & 15], levels[codes >> 4]], -1)
    values = pairs.reshape(*codes.shape[:-1], 32)
    values = np.ldexp(values, scales.numpy().astype(int)[..., None] - 127)
    return torch.from_numpy(values.reshape(*codes.shape[:2], -1)).transpose(1, 2)


def decoded(folder: Path) -> Tensors:
    """All tensors of a source, as it is opened."""
    checkpoint = open_checkpoint(folder)
    with TileReader() as reader:
        return {name: reader.read_tensor(info) for name, info in checkpoint.tensors.items()}


def assert_same(found: torch.Tensor, wanted: torch.Tensor, name: object = "") -> None:
    """Equal in dtype, shape and every bit."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
    bits: Any = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = bits[found.element_size()]
    assert torch.equal(found.contiguous().view(whole), wanted.contiguous().view(whole)), name
