"""Artifacts to merge into, and adapters written by hand with safetensors alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from irq_convert.artifact.config import module_name
from irq_convert.artifact.contents import open_artifact
from irq_convert.artifact.identity import artifact_identity
from irq_convert.core.spec import QuantSpec
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.core.elastic_matrix import elastic_matrix
from tests.folders import read_json
from tests.formats import numpy_reader
from tests.tiny import LLAMA, llama_tensors, write_source

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"
DOWN0 = "model.layers.0.mlp.down_proj"
SETTINGS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "peft_version": "0.21.2",
    "base_model_name_or_path": None,
    "inference_mode": True,
    "target_modules": ["q_proj", "v_proj", "down_proj", "gate_proj"],
    "exclude_modules": None,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_core": "megatron.core",
    "use_dora": False,
    "qalora_group_size": 16,
}


def make_artifact(
    folder: Path,
    codebook: str = "nf4",
    dtype: torch.dtype = torch.float32,
    block_size: int = 32,
    keep: Iterable[str] = (),
    seed: int = 0,
    **config: Any,
) -> Path:
    """Quantize a tiny LLaMA of two layers; its widths, 96 and 172, have tails."""
    source = write_source(
        folder.with_name(folder.name + "-source"),
        llama_tensors(dtype, seed),
        LLAMA | {"dtype": str(dtype).removeprefix("torch."), **config},
    )
    options = QuantizeOptions(QuantSpec(codebook, block_size), keep=tuple(keep), threads=1)
    quantize(str(source), folder, options)
    return folder


def linear_shapes(artifact: Path) -> dict[str, tuple[int, int, int | None]]:
    """(out, in, block size or None) of every linear module, quantized or kept."""
    opened = open_artifact(artifact)
    shapes: dict[str, tuple[int, int, int | None]] = {
        module_name(t.name): (t.shape.rows, t.shape.cols, t.format.block_size)
        for t in opened.quantized
    }
    for info in opened.copied:
        if "_proj" in info.name:
            shapes[module_name(info.name)] = (info.shape[0], info.shape[1], None)
    return shapes


def matches(settings: Mapping[str, Any], module: str) -> bool:
    return module.rsplit(".", 1)[-1] in settings["target_modules"]


def write_adapter(
    folder: Path,
    artifact: Path | None,
    shapes: Mapping[str, tuple[int, int, int | None]] | None = None,
    *,
    kind: str = "iec",
    rank: int = 8,
    alpha: float = 16,
    connection: str = "both",
    size: float = 0.02,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    base: str | None = "recorded",
    saved: Mapping[str, torch.Tensor] | None = None,
    **more: Any,
) -> Path:
    """An adapter of `kind` "plain", "iec" or "block" with random numbers everywhere."""
    generator = torch.Generator().manual_seed(seed)
    settings = SETTINGS | {"r": rank, "lora_alpha": alpha} | more
    if kind == "plain":
        settings |= {"peft_type": "LORA"}
        connection = "none"
    else:
        settings |= {"peft_type": "IEC_LORA", "connection": connection}
        settings |= {"pool": "block" if kind == "block" else None}
        settings.setdefault("block_size", None)
    if shapes is None:
        assert artifact is not None
        shapes = linear_shapes(artifact)
    if base == "recorded" and artifact is not None:
        base = artifact_identity(artifact)
    tensors: dict[str, torch.Tensor] = {}
    for module, (out, cols, own) in shapes.items():
        if not matches(settings, module):
            continue
        r = settings["rank_pattern"].get(module.rsplit(".", 1)[-1], rank)
        inputs = cols
        if kind == "block":
            inputs = math.ceil(cols / (own or settings["block_size"]))
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(r, inputs, generator=generator)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(out, r, generator=generator) * size
        if connection != "none":
            beta = torch.randn(2, generator=generator)
            tensors[f"{PREFIX}{module}.lora_iec_beta"] = beta
    tensors |= {PREFIX + name: tensor for name, tensor in (saved or {}).items()}
    folder.mkdir(parents=True)
    save_file({k: v.to(dtype) for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    if kind != "plain":
        settings["base_sha256"] = base
    elif base is not None:
        note = {"format": "irq-adapter", "format_version": 1, "base": {"sha256": base}}
        (folder / "irq_adapter.json").write_text(json.dumps(note))
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def exact_delta(
    adapter: Path, module: str, cols: int, block_size: int | None = None
) -> torch.Tensor:
    """`s (B + beta2 E)(A + beta1 P)` in float64 from the files, by the dense matrices."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    stored = load_file(adapter / WEIGHTS)
    a, b = (stored[f"{PREFIX}{module}.lora_{x}.weight"].double() for x in "AB")
    rank = a.shape[0]
    beta = stored.get(f"{PREFIX}{module}.lora_iec_beta", torch.zeros(2)).double()
    connection = settings.get("connection", "none")
    first = beta[0] if connection in ("both", "input") else 0.0
    second = beta[1] if connection in ("both", "output") else 0.0
    pool = torch.eye(cols, dtype=torch.float64)
    mean = pool
    if settings.get("pool") == "block":
        assert block_size is not None
        owner = torch.arange(cols) // block_size
        blocks = torch.arange(a.shape[1])
        pool = (blocks[:, None] == owner[None, :]).double()
        mean = pool / pool.sum(1, keepdim=True)
    inner = a @ pool + first * elastic_matrix(rank, a.shape[1]) @ mean
    alpha = settings["alpha_pattern"].get(module.rsplit(".", 1)[-1], settings["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)
    return scale * (b @ inner + second * elastic_matrix(b.shape[0], rank) @ inner)


def change_settings(adapter: Path, **changes: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return adapter


def change_weights(adapter: Path, change: Any) -> Path:
    tensors = {name: tensor.clone() for name, tensor in load_file(adapter / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    return adapter


def adapted(artifact: Path, adapter: Path) -> list[tuple[str, int, int]]:
    settings = read_json(adapter / "adapter_config.json")
    return [
        (module, cols, own)
        for module, (_, cols, own) in linear_shapes(artifact).items()
        if matches(settings, module) and own is not None
    ]


def values_of(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = numpy_reader.read_artifact(folder)
    return found
