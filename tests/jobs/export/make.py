"""Artifacts to export: tiny models of several families, and zero points put on the scale's grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from irq_convert.core.codebook import get_codebook
from irq_convert.core.scales import expand_statistic
from irq_convert.core.spec import QuantSpec
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.tiny import tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SPREAD = {".bias": (1.0, 0.1), "norm": (1.0, 0.1), "": (0.0, 0.08)}


def save_model(folder: Path, family: str = "llama", seed: int = 0, **more: Any) -> Path:
    """A random model as transformers saves it, in bfloat16 unless told otherwise."""
    dtype = getattr(torch, more.pop("dtype", "bfloat16"))
    tiny_model(family, seed, dtype, SPREAD, **{**SIZES, **more}).save_pretrained(folder)
    return folder


def quantized(source: Path, folder: Path, codebook: str = "int4", **more: Any) -> Path:
    """The artifact of `source`; `more` are `block_size` and options of a conversion."""
    spec = QuantSpec(codebook, more.pop("block_size", 32))
    quantize(str(source), folder, QuantizeOptions(spec, threads=1, **more))
    return folder


def put_on_grid(artifact: Path, seed: int = 0) -> Path:
    """Give every block of an int artifact a random integer zero point, by hand.

    `tau = -float32(level[zp] * scale)` in float32; codes and scales stay, the weights change.
    """
    generator = torch.Generator().manual_seed(seed)
    raw = json.loads((artifact / "config.json").read_text())
    settings = raw["quantization_config"]
    for path in sorted(artifact.glob("*.safetensors")):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("_tau")]:
            stem = name.removesuffix("_tau")
            own = settings["overrides"].get(stem.removesuffix(".weight"), {})
            levels = get_codebook(own.get("codebook", settings["codebook"])).level_array()
            scale = expand_statistic(tensors[f"{stem}_scale"], tensors.get(f"{stem}_scale_grid"))
            zero = torch.randint(0, len(levels), scale.shape, generator=generator)
            tensors[name] = -(torch.from_numpy(levels)[zero] * scale)
            tensors.pop(f"{stem}_tau_grid", None)
        save_file(tensors, path, {"format": "pt"})
    settings["tau_dtype"] = "float32"
    (artifact / "config.json").write_text(json.dumps(raw))
    (artifact / "irq_manifest.json").unlink(missing_ok=True)
    return artifact
