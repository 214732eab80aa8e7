"""Checkpoints for the command line: a sound one, and its files taken apart by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import random_tensors, write_source

CONFIG = {"model_type": "of my own", "hidden_size": 64}
SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP0 = "model.layers.0.mlp.up_proj.weight"
DOWN0 = "model.layers.0.mlp.down_proj.weight"


def make_source(folder: Path, shards: int = 1, rows: int = 172, seed: int = 0) -> Path:
    """Write a small model whose linears are found by name; `rows` sets the size of its layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (80, 64)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.mlp.up_proj.weight"] = (rows, 64)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (64, rows)
        shapes[f"{prefix}.input_layernorm.weight"] = (64,)
    files = {"tokenizer.json": '{"version": "1.0"}'}
    return write_source(folder, random_tensors(shapes, seed), CONFIG, shards, files)


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: dict[str, Any] | str, data: bytes, length: int | None = None) -> None:
    """Write a safetensors file by hand, with a false header length where one is given."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
