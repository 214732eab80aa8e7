"""Tiny LLaMA-like checkpoints of random numbers, their artifacts, and ways to damage those."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from irq_convert.checkpoint.files import sha256_file
from irq_convert.checkpoint.header import read_header
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize

HIDDEN, WIDE, VOCABULARY = 64, 172, 40
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),  # 172 is no multiple of a block, nor of 8 codes
}
OPTIONS = QuantizeOptions(bits_for=(("down_proj", 3),), threads=1)
SHARD = "model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj.weight"
DOWN0 = "model.layers.0.mlp.down_proj.weight"
NORM0 = "model.layers.0.input_layernorm.weight"


def source_tensors(seed: int = 0, layers: int = 2) -> dict[str, torch.Tensor]:
    """Random tensors in bfloat16, one linear in float32, under the names of a LLaMA."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"model.embed_tokens.weight": noise(VOCABULARY, HIDDEN).bfloat16()}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, shape in LINEARS.items():
            tensors[f"{prefix}.{name}.weight"] = noise(*shape).bfloat16()
        tensors[f"{prefix}.input_layernorm.weight"] = noise(HIDDEN).bfloat16()
    tensors[Q0] = tensors[Q0].float()
    return tensors | {
        "model.norm.weight": noise(HIDDEN).bfloat16(),
        "lm_head.weight": noise(VOCABULARY, HIDDEN).bfloat16(),
        "logit_scale": noise(1)[0],  # named like a part, but of nothing
        "position_ids": torch.arange(7)[None],
    }


def make_source(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Write a checkpoint with files to carry over; its config names no architecture."""
    (folder / "assets").mkdir(parents=True)
    save_file(source_tensors(seed, layers), folder / SHARD, {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("# A model\n")
    (folder / "assets" / "note.txt").write_text("kept\n")
    return folder


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


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the only shard of `folder` with `change` applied to its tensors."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, {"format": "pt"})


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file with `change` applied to its object."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def change_config(folder: Path, change: Callable[[Any], Any]) -> None:
    change_json(folder / "config.json", lambda raw: change(raw["quantization_config"]))


def change_manifest(folder: Path, change: Callable[[Any], Any]) -> None:
    change_json(folder / "irq_manifest.json", change)


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


def assert_one_line(message: str, *words: str) -> None:
    """Check that a message is one line and holds every one of `words`."""
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
