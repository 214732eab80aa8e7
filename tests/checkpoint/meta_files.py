"""Small LLaMAs in Meta's layout, and what they are in transformers' names, by whole tensors.

The oracle follows the published conversion of whole matrices: slices put together, then rows of q
and k taken apart into pairs. It shares no code with what reads tiles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
NAMES = {
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@dataclass(frozen=True)
class MetaModel:
    """Sizes; `wide`: slices of the embedding lie side by side, as in LLaMA 1 and 2."""

    parts: int = 1
    dim: int = 64
    layers: int = 2
    heads: int = 8
    kv_heads: int | None = None
    vocab: int = 96
    ffn: int = 192
    wide: bool = True
    dtype: torch.dtype = torch.bfloat16
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> int:
        return self.kv_heads or self.heads

    @property
    def params(self) -> dict[str, Any]:
        own = {"n_kv_heads": self.kv_heads} if self.kv_heads else {}
        return {
            "dim": self.dim,
            "multiple_of": 16,
            "n_heads": self.heads,
            "n_layers": self.layers,
            "norm_eps": 1e-5,
            "vocab_size": -1,
            **own,
            **self.more,
        }


def whole_tensors(model: MetaModel, seed: int = 0) -> Tensors:
    """Meta's tensors before they are sliced."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.1 + mean).to(model.dtype)

    dim, head = model.dim, model.dim // model.heads
    found = {"tok_embeddings.weight": draw(model.vocab, dim), "norm.weight": draw(dim, mean=1.0)}
    found |= {"output.weight": draw(model.vocab, dim), "rope.freqs": torch.ones(head // 2)}
    for layer in range(model.layers):
        shapes = {
            "attention.wq": (dim, dim),
            "attention.wk": (model.keys * head, dim),
            "attention.wv": (model.keys * head, dim),
            "attention.wo": (dim, dim),
            "feed_forward.w1": (model.ffn, dim),
            "feed_forward.w2": (dim, model.ffn),
            "feed_forward.w3": (model.ffn, dim),
        }
        found |= {f"layers.{layer}.{n}.weight": draw(*shape) for n, shape in shapes.items()}
        for name in ("attention_norm", "ffn_norm"):
            found[f"layers.{layer}.{name}.weight"] = draw(dim, mean=1.0)
    return found


def slice_of(name: str, tensor: torch.Tensor, model: MetaModel, part: int) -> torch.Tensor:
    """What one of the files holds of a tensor."""
    if tensor.ndim == 1:
        return tensor.clone()
    side = name.endswith(("wo.weight", "w2.weight")) or (name.startswith("tok_") and model.wide)
    return tensor.chunk(model.parts, int(side))[part].clone()


def write_meta(folder: Path, model: MetaModel, tensors: Tensors | None = None) -> Tensors:
    """Write the files; returns the whole tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors or whole_tensors(model)
    for part in range(model.parts):
        state = {name: slice_of(name, tensor, model, part) for name, tensor in tensors.items()}
        torch.save(state, folder / f"consolidated.{part:02}.pth")
    (folder / "params.json").write_text(json.dumps(model.params))
    return tensors


def converted(tensors: Tensors, model: MetaModel) -> Tensors:
    """Meta's tensors under transformers' names and in its order of rotary pairs."""

    def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
        pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
        return pairs.transpose(1, 2).reshape(weight.shape)

    found = {
        "model.embed_tokens.weight": tensors["tok_embeddings.weight"],
        "model.norm.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["output.weight"],
    }
    for layer in range(model.layers):
        theirs, ours = f"layers.{layer}.", f"model.layers.{layer}."
        wq, wk = (tensors[f"{theirs}attention.{name}.weight"] for name in ("wq", "wk"))
        found[f"{ours}self_attn.q_proj.weight"] = halves(wq, model.heads)
        found[f"{ours}self_attn.k_proj.weight"] = halves(wk, model.keys)
        for name, new in NAMES.items():
            found[f"{ours}{new}.weight"] = tensors[f"{theirs}{name}.weight"]
    return found
