"""Tiny random LLaMA models and their artifacts, written with safetensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from irq_convert.artifact.config import ModuleFormat, QuantizationConfig, module_name
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.spec import QuantSpec

NF4 = ModuleFormat("nf4", 64)


def tiny_llama(tied: bool = False, seed: int = 0, bias: bool = False) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, widths 96 and 172 that no block size divides."""
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=80,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=bias,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    return model


def linear_names(model: torch.nn.Module) -> list[str]:
    """Weights of the linear layers that get quantized: all but the head."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and name != "lm_head"
    ]


def write_artifact(
    folder: Path,
    model: LlamaForCausalLM,
    default: ModuleFormat = NF4,
    overrides: dict[str, ModuleFormat] | None = None,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Write `model` quantized to `folder`; return its float32 state dict with decoded weights."""
    from irq_convert.core.dequantize import dequantize_tensor

    config = QuantizationConfig(default, ("lm_head",), overrides or {}, {"producer": "a test"})
    tensors: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    wanted = set(linear_names(model))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name not in wanted:
            tensors[name] = tensor.to(dtype).contiguous().clone()
            dense[name] = tensors[name].float()
            continue
        fmt = config.module(module_name(name))
        q = quantize_tensor(tensor.float(), QuantSpec(fmt.codebook, fmt.block_size))
        assert (fmt.scale_dtype, fmt.tau_dtype) == ("uint8", "uint8")
        tensors |= {name + suffix: part.contiguous() for suffix, part in q.parts().items()}
        dense[name] = dequantize_tensor(q, backend="torch")
    folder.mkdir(parents=True, exist_ok=True)
    raw = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_config": config.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(raw))
    _write_shards(folder, tensors, shards)
    return dense


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = {name: tensors[name] for name in names[shard::shards]}  # parts lie apart
        save_file(mine, folder / file, {"format": "pt"})
        where |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of `folder`."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The `quantization_config` in `folder`."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return raw


def change_tensors(folder: Path, change: Any) -> None:
    """Rewrite the only file of `folder` with `change` applied to its dict of tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def change_config(folder: Path, change: Any) -> None:
    """Rewrite config.json with `change` applied to its `quantization_config`."""
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    change(raw["quantization_config"])
    file.write_text(json.dumps(raw))


def dense_model(model: LlamaForCausalLM, dense: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """`model` with the decoded weights: what a loaded artifact has to compute like."""
    twin = LlamaForCausalLM(model.config).eval()
    missing, unexpected = twin.load_state_dict(dense, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    twin.tie_weights()
    return twin
