"""Artifacts of tiny models, written with safetensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from irq_convert.artifact.config import ModuleFormat, QuantizationConfig, module_name
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.spec import QuantSpec
from tests.tiny import write_tensors

NF4 = ModuleFormat("nf4", 64)


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
    write_tensors(folder, dict(sorted(tensors.items())), shards)  # several: parts lie apart
    return dense


def read_config(folder: Path) -> dict[str, Any]:
    """The `quantization_config` in `folder`."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return raw


def dense_model(model: LlamaForCausalLM, dense: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """`model` with the decoded weights: what a loaded artifact has to compute like."""
    twin = LlamaForCausalLM(model.config).eval()
    missing, unexpected = twin.load_state_dict(dense, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    twin.tie_weights()
    return twin
