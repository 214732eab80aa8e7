"""Tensor names and shapes as llama.cpp expects them, and rows in its order of rotary pairs.

llama.cpp refuses a file with a tensor that it does not ask for, so each tensor of the model is
either known here or refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import gguf
import numpy as np
import torch

from irq_convert.errors import UsageError
from irq_convert.jobs.export.gguf.family import Model

Rows = TypeVar("Rows", torch.Tensor, np.ndarray)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BUFFERS = (".rotary_emb.inv_freq",)
"""Endings of tensors that old checkpoints carry and every program computes anew."""


@dataclass(frozen=True)
class GgufPlace:
    """Where a tensor goes: its name in the file, the shape it must have, and `heads` of rows whose
    halves interleave (0: rows stay)."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0


def find_places(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, GgufPlace]:
    """The place of each tensor of `shapes` that goes into the file, by the checkpoint's name.

    Left out are buffers, and a head that is tied to the embeddings. Raises `UsageError` for a
    tensor that is unknown, missing or of another shape than the configuration says.
    """
    wanted, optional = _layout(model)
    expected = wanted | optional
    names = gguf.get_tensor_name_map(model.family.arch, model.layers)
    found = {}
    for name, shape in shapes.items():
        if name.endswith(BUFFERS) or (name == HEAD and model.tied):
            continue
        if name not in expected:
            raise UsageError(_unknown(name, model))
        if shape != expected[name].shape:
            raise UsageError(
                f"{name} has shape {list(shape)}, but config.json makes it "
                f"{list(expected[name].shape)}: correct config.json"
            )
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert to is not None, name
        found[name] = GgufPlace(to, shape, expected[name].heads)
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UsageError(f"{missing[0]}{more} missing: llama.cpp needs it; get the whole model")
    return found


def _unknown(name: str, model: Model) -> str:
    if "expert" in name:
        return f"{name}: --to gguf writes no mixtures of experts; use --to dense"
    return (
        f"{name}: llama.cpp has no such tensor in {model.family.model_type}, and refuses files "
        "with more than it knows; use --to dense"
    )


def _layout(model: Model) -> tuple[dict[str, GgufPlace], dict[str, GgufPlace]]:
    """Every tensor by the checkpoint's name: those that must be there and those that may be."""
    hidden, embedding = model.hidden, (model.vocab, model.hidden)
    wanted = {EMBEDDING: GgufPlace("", embedding), "model.norm.weight": GgufPlace("", (hidden,))}
    if not model.tied:
        wanted[HEAD] = GgufPlace("", embedding)
    optional: dict[str, GgufPlace] = {}
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        for name, shape in _norms(model):
            wanted[f"{prefix}{name}.weight"] = GgufPlace("", shape)
        for room, name, rows, cols, heads in _linears(model):
            wanted[f"{prefix}{room}.{name}.weight"] = GgufPlace("", (rows, cols), heads)
            if name in model.family.biases:
                optional[f"{prefix}{room}.{name}.bias"] = GgufPlace("", (rows,), heads)
    return wanted, optional


def _norms(model: Model) -> Iterable[tuple[str, tuple[int, ...]]]:
    yield "input_layernorm", (model.hidden,)
    yield "post_attention_layernorm", (model.hidden,)
    if model.family.head_norms:
        yield "self_attn.q_norm", (model.head_dim,)
        yield "self_attn.k_norm", (model.head_dim,)


def _linears(model: Model) -> Iterable[tuple[str, str, int, int, int]]:
    """Room, name, rows, columns, and heads whose rows interleave."""
    hidden, ffn = model.hidden, model.ffn
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    turned = model.family.interleaved
    yield "self_attn", "q_proj", queries, hidden, model.heads if turned else 0
    yield "self_attn", "k_proj", keys, hidden, model.kv_heads if turned else 0
    yield "self_attn", "v_proj", keys, hidden, 0
    yield "self_attn", "o_proj", hidden, queries, 0
    yield "mlp", "gate_proj", ffn, hidden, 0
    yield "mlp", "up_proj", ffn, hidden, 0
    yield "mlp", "down_proj", hidden, ffn, 0


def interleave(rows: Rows, heads: int) -> Rows:
    """Rows of `heads` heads, `[heads * d, ...]`, with row j of each half next to each other.

    Row s * d/2 + j of a head (s is 0 or 1) becomes its row 2 j + s.
    """
    split = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)
