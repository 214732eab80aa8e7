"""Tiny LLaMA-like checkpoints of random numbers, their artifacts, and ways to damage those."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.manifest import SEAL, manifest_sha256
from irq_convert.checkpoint.files import sha256_file
from irq_convert.checkpoint.header import read_header
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.folders import SHARD, change_json
from tests.tiny import random_tensors, write_source

HIDDEN, WIDE, VOCABULARY = 64, 172, 40
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),  # 172 is no multiple of a block, nor of 8 codes
}
OPTIONS = QuantizeOptions(bits_for=(("down_proj", 3),), threads=1)
Q0 = "model.layers.0.self_attn.q_proj.weight"
DOWN0 = "model.layers.0.mlp.down_proj.weight"
NORM0 = "model.layers.0.input_layernorm.weight"


def source_tensors(seed: int = 0, layers: int = 2) -> dict[str, torch.Tensor]:
    """Random tensors in bfloat16, one linear in float32, under the names of a LLaMA."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in LINEARS.items()}
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    tensors = random_tensors({**shapes, "logit_scale": (1,)}, seed, torch.bfloat16)
    return tensors | {
        Q0: tensors[Q0].float(),
        "logit_scale": tensors["logit_scale"][0].float(),  # named like a part, but of nothing
        "position_ids": torch.arange(7)[None],
    }


def make_source(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Write a checkpoint with files to carry over; its config names no architecture."""
    files = {"tokenizer.json": '{"version": "1.0"}', "README.md": "# A model\n"}
    files["assets/note.txt"] = "kept\n"
    config = {"model_type": "llama", "hidden_size": HIDDEN}
    return write_source(folder, source_tensors(seed, layers), config, files=files)


def make_artifact(source: Path, out: Path, options: QuantizeOptions = OPTIONS) -> Path:
    quantize(str(source), out, options)
    return out


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def flip(folder: Path, tensor: str, at: int = 0, mask: int = 1, shard: str = SHARD) -> None:
    """Change bits of byte `at` of a tensor's data in place."""
    path = folder / shard
    where = read_header(path).tensors[tensor].offset + at
    data = bytearray(path.read_bytes())
    data[where] ^= mask
    path.write_bytes(data)


def change_manifest(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change it and seal it again, so that only deeper checks can find what was changed."""

    def change_and_seal(manifest: Any) -> None:
        change(manifest)
        manifest[SEAL] = manifest_sha256(manifest)

    change_json(folder / "irq_manifest.json", change_and_seal)


def reseal(folder: Path) -> Path:
    """Write the checksums of what is there now, so that only deeper checks can find damage."""

    def seal(manifest: Any) -> None:
        manifest["files"] = {
            path.relative_to(folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "irq_manifest.json"
        }

    change_manifest(folder, seal)
    return folder
