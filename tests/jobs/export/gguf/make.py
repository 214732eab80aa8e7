"""Tiny random models of the four families, quantized, with the demo model's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from irq_convert.artifact.config import ModuleFormat
from irq_convert.jobs.export.export import export
from irq_convert.jobs.export.options import ExportOptions
from tests.hf.artifact import write_artifact
from tests.paths import DEMO
from tests.tiny import tiny_model

pytest.importorskip("gguf", reason="the package gguf is not installed")

INT4 = ModuleFormat("int4", 32)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def readable_model(family: str, tied: bool = False, **changes: Any) -> Any:
    """A model that llama.cpp takes: rows of whole blocks of 32, random norms and biases."""
    sizes: dict[str, Any] = {
        "intermediate_size": 160,
        # transformers takes qwen3's heads to have 128, whatever a GGUF file says.
        "head_dim": 128 if family == "qwen3" else 16,
        "vocab_size": 1024,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 20000.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": tied,
    }
    spread = {".bias": (0.5, 0.5), "norm.weight": (0.5, 0.5), "": (0.0, 0.2)}
    return tiny_model(family, spread=spread, **sizes | changes)


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
