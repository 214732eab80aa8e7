"""Tiny random models of the four families, quantized, with the demo model's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from irq_convert.artifact.config import ModuleFormat
from irq_convert.jobs.export.export import export
from irq_convert.jobs.export.options import ExportOptions
from tests.hf.artifact import write_artifact
from tests.paths import DEMO

pytest.importorskip("gguf", reason="the package gguf is not installed")

INT4 = ModuleFormat("int4", 32)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_model(family: str, tied: bool = False, **changes: Any) -> Any:
    """Two layers, grouped heads, rows of whole blocks of 32, random norms and biases."""
    sizes: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        # transformers takes qwen3's heads to have 128, whatever a GGUF file says.
        "head_dim": 128 if family == "qwen3" else 16,
        "vocab_size": 1024,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 20000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**sizes | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "norm.weight")):
            torch.nn.init.normal_(parameter, 0.5, 0.5)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model


def make_artifact(
    folder: Path, model: Any, default: ModuleFormat = INT4, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Write `model` quantized, with a tokenizer; returns its dense values by name."""
    dense = write_artifact(folder, model, default, dtype=dtype)
    change_config(folder, architectures=[type(model).__name__])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return dense


def change_config(folder: Path, **changes: Any) -> None:
    """Rewrite config.json; a value of None removes the key."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def export_gguf(artifact: Path, out: Path, **options: Any) -> tuple[Path, Any]:
    """The file written, and the report."""
    report = export(artifact, out, ExportOptions(to="gguf", **options))
    (file,) = out.glob("*.gguf")
    return file, report
