"""Artifacts, an adapter and merged ones for the serve scripts; what is there is not made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import irq_convert

TRAINING = {
    "steps": 12,
    "rank": 8,
    "batch_size": 4,
    "sequence_length": 128,
    "learning_rate": 2e-3,
    "dropout": 0.0,
}
"""Enough for an adapter that changes what the model says."""


class Artifacts:
    """Folders below `work`, made from the dense `model` when they are first asked for."""

    def __init__(self, model: Path, text: Path, work: Path) -> None:
        self.model, self.text, self.work = model, text, work
        work.mkdir(parents=True, exist_ok=True)
        heads = json.loads((model / "config.json").read_text())["num_key_value_heads"]
        self.ranks = next(ranks for ranks in (2, 3, heads) if heads % ranks == 0)

    def quantized(self, name: str, **settings: Any) -> Path:
        """The artifact called `name`, quantized by `settings`."""
        return self._made(name, lambda out: irq_convert.quantize(self.model, out, **settings))

    def codebook(self, name: str) -> Path:
        """A plain artifact in codebook `name`."""
        return self.quantized(name, codebook=name[:-1], bits=int(name[-1]))

    def adapter(self, base: Path, kind: str) -> Path:
        """An adapter of `kind`, trained a little on `base`."""

        def train(out: Path) -> Any:
            return irq_convert.finetune(base, self.text, out, lora=kind, **TRAINING)

        return self._made(f"{base.name}-{kind}", train)

    def merged(self, base: Path, adapter: Path, to: str, **settings: Any) -> Path:
        """`adapter` merged: "irq", "dense", or "adapter", a plain LoRA."""
        return self._made(
            f"{adapter.name}-{to}",
            lambda out: irq_convert.merge(base, adapter, out, to=to, **settings),
        )

    def exported(self, base: Path, **settings: Any) -> Path:
        """`base` for compressed-tensors."""
        return self._made(
            f"{base.name}-packed",
            lambda out: irq_convert.export(base, out, to="compressed-tensors", **settings),
        )

    def mixture(self) -> Path:
        """A random mixture of experts with the tokenizer of the model, in 3 bits."""

        def make(out: Path) -> None:
            from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

            more = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
            config = Qwen3MoeConfig(**SHAPE, **more, vocab_size=vocabulary(self.model))
            save_random(Qwen3MoeForCausalLM, config, self.model, out)

        dense = self._made("mixture", make)
        return self._made(
            "mixture-nf3", lambda out: irq_convert.quantize(dense, out, bits=3, block_size=32)
        )

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        out = self.work / name
        if not out.is_dir():
            print(f"making {name}", flush=True)
            make(out)
        return out


SHAPE = {
    "hidden_size": 256,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
"""Of random models, whose answers are sure enough to be compared."""


def small_llama(tokenizer: Path, out: Path) -> Path:
    """A random llama of two layers, every width of which groups of 128 divide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not out.is_dir():
        config = LlamaConfig(**SHAPE, vocab_size=vocabulary(tokenizer))
        save_random(LlamaForCausalLM, config, tokenizer, out)
    return out


def vocabulary(model: Path) -> int:
    """How many tokens `model` has."""
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def save_random(cls: Any, config: Any, tokenizer: Path, out: Path) -> None:
    """Save a model of `cls` with random weights and the tokenizer of another."""
    torch.manual_seed(0)
    cls(config).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, out / name)
