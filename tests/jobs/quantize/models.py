"""Small checkpoints to convert, and artifacts read with numpy and safetensors alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from irq_convert.checkpoint.source import Checkpoint, open_checkpoint
from tests.formats import (
    numpy_reader,  # the independent reader, which lives beside the specification
)

__all__ = ["numpy_reader"]

HIDDEN, WIDE, VOCABULARY, HEADS = 96, 172, 80, 6
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
UNKNOWN = {"model_type": "of my own", "layers": 2}
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 3, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 3, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
OTHER_FILES = {
    "tokenizer.json": '{"version": "1.0"}',
    "README.md": "# A model\n",
    "chat_templates/tool use.jinja": "{{ messages }}\n",
    "deep/er/notes.txt": "kept\n",
    "empty": "",
}


def llama_tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the names of the model that `LLAMA` describes."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.05).to(dtype)

    tensors = {"model.embed_tokens.weight": noise(VOCABULARY, HIDDEN)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": noise(*shape) for name, shape in LINEARS.items()}
        tensors[f"{prefix}.input_layernorm.weight"] = noise(HIDDEN)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = noise(HIDDEN)
    return tensors | {
        "model.norm.weight": noise(HIDDEN),
        "lm_head.weight": noise(VOCABULARY, HIDDEN),
    }


def is_linear(name: str) -> bool:
    return "_proj" in name and name.endswith(".weight")


def write_source(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint, by default a tiny LLaMA, dealing the tensors out to `shards` files."""
    tensors = llama_tensors() if tensors is None else tensors
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA if config is None else config, indent=2))
    for name, text in (OTHER_FILES if files is None else files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        file = "model.safetensors" if shards == 1 else file
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def open_meta(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint of zeros in bfloat16 with these names and shapes, opened."""
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    return open_checkpoint(write_source(folder, tensors, config, files={}))


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the folder's safetensors files, as stored."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` with its content, and every folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"/"
        for path in sorted(folder.rglob("*"))
    }
