"""Tiny models: the one place where tests make a configuration, a random model or a checkpoint.

Two layers, grouped-query attention, and widths, 96 and 172, that no block size divides; what a
test needs otherwise it says by `changes`. Of transformers only what makes a model is imported, and
only then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, WIDE, VOCABULARY = 96, 172, 80
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Changes for a model with one head for each query, which more classes take."""
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
"""A vision tower beside a model of the sizes `SMALL`."""
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
"""The config.json of the model whose tensors `llama_tensors` makes."""
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 3, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 3, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
UNKNOWN = {"model_type": "of my own", "layers": 2}
"""The config.json of a model that no library knows."""
OTHER_FILES = {
    "tokenizer.json": '{"version": "1.0"}',
    "README.md": "# A model\n",
    "chat_templates/tool use.jinja": "{{ messages }}\n",
    "deep/er/notes.txt": "kept\n",
    "empty": "",
}


def tiny_config(family: str = "llama", **changes: Any) -> Any:
    """The configuration of a tiny model of a family, by the name that transformers has for it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**{**SIZES, **changes})


def tiny_model(
    family: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    spread: Mapping[str, tuple[float, float]] = MappingProxyType({".bias": (0.0, 1.0)}),
    **changes: Any,
) -> Any:
    """A random causal model of a family.

    `spread` draws parameters anew, by default the biases, which would be 0: the first of its keys
    that is part of a parameter's name gives mean and standard deviation.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        for part, (mean, deviation) in spread.items():
            if part in name:
                torch.nn.init.normal_(parameter, mean, deviation)
                break
    return model.to(dtype)


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Normal values of standard deviation `size` under these names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * size).to(dtype)
        for name, shape in shapes.items()
    }


def llama_tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the names of the model that `LLAMA` describes."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in LINEARS.items()}
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return random_tensors(shapes, seed, dtype, 0.05)


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """Deal the tensors out to `shards` files in turn, with an index when there are several."""
    folder.mkdir(parents=True, exist_ok=True)
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


def write_source(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint, by default a tiny LLaMA, with other files beside it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA if config is None else config, indent=2))
    for name, text in (OTHER_FILES if files is None else files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    write_tensors(folder, llama_tensors() if tensors is None else tensors, shards)
    return folder
