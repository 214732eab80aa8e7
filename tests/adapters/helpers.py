"""Adapters on single layers and on tiny artifacts, and what they must compute, written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import irq_convert
from irq_convert import IecLoraConfig
from irq_convert.adapters.layer import IecLoraLinear
from irq_convert.nn.linear import IrqLinear
from tests.core.oracle import random_sample
from tests.hf.artifact import write_artifact
from tests.tiny import tiny_model

# numba's pool, once started, gives torch a thread for every core; models this small only wait
# for them.
torch.set_num_threads(1)

BASES = ("packed", "linear", "conv1d")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_layer(
    kind: str, rows: int = 24, cols: int = 100, block_size: int = 16, bias: bool = True
) -> tuple[nn.Module, torch.Tensor]:
    """A layer of one of `BASES` and its dense weight `[rows, cols]`, float32."""
    sample = random_sample(rows + cols, rows, cols, "nf3", block_size)
    dense = torch.from_numpy(sample.dense)
    values = torch.randn(rows, generator=torch.Generator().manual_seed(1)) if bias else None
    if kind == "packed":
        return IrqLinear.from_quantized(sample.q, values), dense
    layer = Conv1D(rows, cols) if kind == "conv1d" else nn.Linear(cols, rows, bias)
    with torch.no_grad():
        layer.weight.copy_(dense.T if kind == "conv1d" else dense)
        if values is not None:
            layer.bias.copy_(values)
    return layer, dense


def adapted(base: nn.Module, r: int = 8, alpha: int = 12, **options: Any) -> IecLoraLinear:
    """`base` with one random adapter "default"; the base is frozen."""
    base.requires_grad_(False)
    torch.manual_seed(3)
    config = IecLoraConfig(r=r, lora_alpha=alpha, **options)
    layer = IecLoraLinear(base, "default", config=config, r=r, lora_alpha=alpha)
    randomize(layer)
    return layer


def randomize(
    module: nn.Module, seed: int = 0, adapter: str = "default", size: float = 0.3
) -> None:
    """Give every A, B and beta of `adapter` normal values of standard deviation `size`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name and adapter in name.split("."):
                values = torch.randn(parameter.shape, generator=generator) * size
                parameter.copy_(values)


def dense_p(rank: int, inputs: int) -> torch.Tensor:
    """The method's P, float64 `[rank, inputs]`, entry by entry."""
    g = math.gcd(inputs, rank)
    rows = [[i // (inputs // g) == j // (rank // g) for i in range(inputs)] for j in range(rank)]
    return torch.tensor(rows).double() * g / inputs


def dense_e(outputs: int, rank: int) -> torch.Tensor:
    """The method's E, float64 `[outputs, rank]`, entry by entry."""
    g = math.gcd(outputs, rank)
    rows = [[k // (outputs // g) == j // (rank // g) for j in range(rank)] for k in range(outputs)]
    return torch.tensor(rows).double() * g / rank


def naive(
    layer: IecLoraLinear,
    weight: torch.Tensor,
    x: torch.Tensor,
    connection: str,
    block_size: int | None,
    mask: torch.Tensor | float = 1.0,
    adapter: str = "default",
) -> torch.Tensor:
    """`y` of the method page in float64, with dense P and E; `mask` is dropout's factor."""
    a, b = layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double()
    first = second = torch.zeros(()).double()
    if connection != "none":
        first, second = layer.lora_iec_beta[adapter].weight.double()
    x = x.double()
    bias = layer.get_base_layer().bias
    y = x @ weight.double().T + (0 if bias is None else bias.double())
    seen = pooled = x
    if block_size is not None:
        blocks = -(-x.shape[-1] // block_size)
        of = torch.arange(x.shape[-1]) // block_size
        member = (of[:, None] == torch.arange(blocks)).double()
        seen = x @ member
        pooled = seen / member.sum(0)
    rank = a.shape[0]
    inner = (seen * mask) @ a.T
    if connection in ("both", "input"):
        inner = inner + first * pooled @ dense_p(rank, pooled.shape[-1]).T
    delta = inner @ b.T
    if connection in ("both", "output"):
        delta = delta + second * inner @ dense_e(b.shape[0], rank).T
    return y + layer.scaling[adapter] * delta


def artifact(folder: Path, **options: Any) -> Path:
    """A tiny LLaMA artifact in `folder`; options as of `write_artifact`, and three of the model."""
    model = tiny_model(
        seed=options.pop("seed", 0),
        tie_word_embeddings=options.pop("tied", False),
        attention_bias=options.pop("bias", False),
    )
    write_artifact(folder, model, **options)
    return folder


def adapted_model(folder: Path, seed: int = 0, dtype: Any = None, **options: Any) -> PeftModel:
    """The artifact in `folder` with a random adapter on all its linear layers."""
    model = irq_convert.load(folder, dtype=dtype)
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, iec_config(**options))
    randomize(peft_model, seed, size=0.05)
    return peft_model.eval()


def iec_config(**options: Any) -> IecLoraConfig:
    defaults = {
        "r": 6,
        "lora_alpha": 9,
        "target_modules": list(ALL_LINEAR),
        "task_type": "CAUSAL_LM",
    }
    return IecLoraConfig(**defaults | options)


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 80, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, **options: Any) -> torch.Tensor:
    """Logits of a fixed input, float32."""
    with torch.no_grad():
        found = model(input_ids=tokens(), **options).logits
    assert isinstance(found, torch.Tensor)
    return found.float()


def assert_near(found: torch.Tensor, wanted: torch.Tensor, relative: float = 1e-5) -> None:
    """The largest difference is at most `relative` times the largest value."""
    difference = (found - wanted).abs().max() / wanted.abs().max()
    assert difference <= relative, f"relative difference {difference:.3g}"


def packed_layers(model: nn.Module) -> dict[str, IrqLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, IrqLinear)}


def base_of(model: PeftModel) -> PreTrainedModel:
    found = model.get_base_model()
    assert isinstance(found, PreTrainedModel)
    return found
