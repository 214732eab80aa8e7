"""Checkpoints for the command line: a sound one, and its files taken apart by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG = {"model_type": "of my own", "hidden_size": 64}
SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP0 = "model.layers.0.mlp.up_proj.weight"
DOWN0 = "model.layers.0.mlp.down_proj.weight"


def make_source(folder: Path, shards: int = 1, rows: int = 172, seed: int = 0) -> Path:
    """Write a small model whose linears are found by name; `rows` sets the size of its layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(80, 64, generator=generator)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.mlp.up_proj.weight"] = torch.randn(rows, 64, generator=generator)
        tensors[f"{prefix}.mlp.down_proj.weight"] = torch.randn(64, rows, generator=generator)
        tensors[f"{prefix}.input_layernorm.weight"] = torch.randn(64, generator=generator)
    folder.mkdir(parents=True)
    write_tensors(folder, tensors, shards)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(tensors, folder / SHARD, {"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Write the tensors of the folder's only shard again, changed."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SHARD).items()}
    change(tensors)
    write_tensors(folder, tensors)


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: dict[str, Any] | str, data: bytes, length: int | None = None) -> None:
    """Write a safetensors file by hand, with a false header length where one is given."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
