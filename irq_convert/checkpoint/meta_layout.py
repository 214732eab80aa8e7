"""Meta's own files, `consolidated.NN.pth` beside `params.json`, as a LLaMA of transformers.

The files are those of model-parallel training: each holds a slice of every matrix. Slices of wq,
wk, wv, w1, w3 and the head lie one below the other, of wo and w2 side by side, of the embedding
side by side (LLaMA 1 and 2) or one below the other (3); norms are in all. Meta's rows of q and k
have the two of a rotary pair next to each other, transformers' in two halves of a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.arranged import Arranged, SourceHints
from irq_convert.checkpoint.header import ShardHeader, TensorInfo
from irq_convert.checkpoint.lazy import (
    ColumnParts,
    HalvedHeads,
    LazyTensor,
    Replicas,
    RowParts,
    lazy_info,
)
from irq_convert.checkpoint.meta_params import MetaParams, llama_config, read_params
from irq_convert.checkpoint.reader import TileReader
from irq_convert.errors import IrqError

LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_SIDE_BY_SIDE = ("attention.wo", "feed_forward.w2")
_COMPUTED = "rope.freqs"
_LAYER = re.compile(r"^layers\.\d+\.")
_PART = re.compile(r"consolidated\.(\d\d)\.pth")


def arrange_meta(
    headers: Sequence[ShardHeader], folder: Path, config: dict[str, Any] | None, hints: SourceHints
) -> Arranged:
    """The tensors under transformers' names, in its order, and config.json made of params.json.

    Raises `IrqError` for a missing part, parts of different models, or params.json that says
    something else than the tensors.
    """
    home = headers[0].path.parent
    _check_parts(headers)
    params = read_params(home)
    sizes = [info.shape[0] for info in _slices(headers, "layers.0.feed_forward.w1.weight")]
    rows = [info.shape for info in _slices(headers, "tok_embeddings.weight")]
    params = replace(params, ffn=sum(sizes), vocab=params.vocab or _vocabulary(params, rows))
    tensors = {name: _put_together(name, ours, headers, params) for name, ours in _names(params)}
    _check_nothing_else(headers, tensors, params)
    found, unknown = llama_config(params, _dtype(headers), hints)
    if found.get("tie_word_embeddings"):
        tensors["tok_embeddings.weight"] = _checked_tie(tensors)
        del tensors["output.weight"]
    if not hints.headers_only:
        _check_norms(tensors)
    by_name = {info.name: info for info in tensors.values()}
    prefix = home.relative_to(folder).as_posix() + "/" if home != folder else ""
    gone = tuple(prefix + name for name in ("params.json", "checklist.chk"))
    computed = any(_COMPUTED in header.tensors for header in headers)
    dropped = ((_COMPUTED, "transformers computes it"),) if computed else ()
    return Arranged(by_name, found, gone, dropped, unknown)


def _names(params: MetaParams) -> Iterator[tuple[str, str]]:
    """Meta's name and transformers', in the order of a forward pass."""
    yield "tok_embeddings.weight", "model.embed_tokens.weight"
    for layer in range(params.layers):
        for name, ours in LAYER.items():
            yield f"layers.{layer}.{name}.weight", f"model.layers.{layer}.{ours}.weight"
    yield "norm.weight", "model.norm.weight"
    yield "output.weight", "lm_head.weight"


def _check_parts(headers: Sequence[ShardHeader]) -> None:
    for number, header in enumerate(headers):
        match = _PART.fullmatch(header.path.name)
        if match is None or int(match[1]) != number:
            raise IrqError(
                f"{header.path.with_name(f'consolidated.{number:02}.pth')}: missing; each part "
                "holds a slice of every matrix: get all of them"
            )


def _slices(headers: Sequence[ShardHeader], name: str) -> list[TensorInfo]:
    """One tensor of every part; they have to be alike."""
    found = []
    for header in headers:
        if name not in header.tensors:
            raise IrqError(
                f"{header.path}: lacks {name}, which a LLaMA of Meta's layout has by params.json; "
                "get the whole model, with its own params.json"
            )
        found.append(header.tensors[name])
    first = found[0]
    for info in found[1:]:
        if (info.dtype, info.shape) != (first.dtype, first.shape):
            raise IrqError(
                f"{info.shard}: {name} is {info.dtype} {list(info.shape)}, in {first.shard.name} "
                f"{first.dtype} {list(first.shape)}: the files are of different models"
            )
    return found


def _vocabulary(params: MetaParams, shapes: Sequence[tuple[int, ...]]) -> int:
    """Rows of the whole embedding, whose slices are narrow or short."""
    return shapes[0][0] if shapes[0][-1] != params.dim else sum(shape[0] for shape in shapes)


def _put_together(
    name: str, ours: str, headers: Sequence[ShardHeader], params: MetaParams
) -> TensorInfo:
    slices = tuple(_slices(headers, name))
    stem = _stem(name)
    rows, cols = _shape(name, params)
    lazy: LazyTensor
    if cols is None:
        lazy, shape = Replicas(slices), slices[0].shape
    elif stem in _SIDE_BY_SIDE or (stem == "tok_embeddings" and slices[0].shape[-1] != cols):
        lazy, shape = ColumnParts(slices), (slices[0].shape[0], sum(s.shape[-1] for s in slices))
    else:
        lazy, shape = RowParts(slices), (sum(s.shape[0] for s in slices), slices[0].shape[-1])
    wanted = (rows,) if cols is None else (rows, cols)
    if shape != wanted:
        raise IrqError(_contradiction(name, slices, shape, wanted))
    dtype = slices[0].dtype
    heads = {"attention.wq": params.heads, "attention.wk": params.kv_heads}.get(stem)
    if heads is None:
        return lazy_info(ours, dtype, shape, lazy)
    return lazy_info(ours, dtype, shape, HalvedHeads(lazy_info(name, dtype, shape, lazy), heads))


def _shape(name: str, params: MetaParams) -> tuple[int, int | None]:
    """Rows and columns of the whole matrix by params.json; columns None for a vector."""
    keys = params.kv_heads * params.head_dim
    return {
        "attention.wq": (params.dim, params.dim),
        "attention.wk": (keys, params.dim),
        "attention.wv": (keys, params.dim),
        "attention.wo": (params.dim, params.dim),
        "feed_forward.w1": (params.ffn, params.dim),
        "feed_forward.w3": (params.ffn, params.dim),
        "feed_forward.w2": (params.dim, params.ffn),
        "tok_embeddings": (params.vocab, params.dim),
        "output": (params.vocab, params.dim),
    }.get(_stem(name), (params.dim, None))


def _stem(name: str) -> str:
    """Meta's name of a tensor without its layer and ending."""
    return _LAYER.sub("", name).removesuffix(".weight")


def _contradiction(
    name: str,
    slices: Sequence[TensorInfo],
    shape: tuple[int, ...],
    wanted: tuple[int, ...],
) -> str:
    """In words; where a part is missing one dimension is too short by whole slices."""
    shard, count = slices[0].shard, len(slices)
    many = f"{count} parts" if count > 1 else "one part"
    found = f"{name} is {list(shape)} in {many}, params.json makes it {list(wanted)}"
    ratios = {w / s for s, w in zip(shape, wanted, strict=False) if s} - {1.0}
    ratio = ratios.pop() if len(ratios) == 1 and len(shape) == len(wanted) else 0.0
    if ratio > 1 and (ratio * count) % 1 == 0:
        missing = shard.with_name(f"consolidated.{count:02}.pth").name
        return f"{shard.parent}: {found}: {missing} is missing, or params.json is of another model"
    return f"{shard}: {found}: it is of another model; get the one that belongs to these files"


def _check_nothing_else(
    headers: Sequence[ShardHeader], known: dict[str, TensorInfo], params: MetaParams
) -> None:
    for header in headers:
        for name, info in header.tensors.items():
            if name == _COMPUTED and info.shape != (params.head_dim // 2,):
                raise IrqError(
                    f"{header.path}: {name} is {list(info.shape)}, params.json makes it "
                    f"{[params.head_dim // 2]} with {params.heads} heads: it is of another model; "
                    "get the one that belongs to these files"
                )
            if name in known or name == _COMPUTED:
                continue
            if _LAYER.sub("layers.0.", name) in known:
                raise IrqError(
                    f"{header.path}: has {name}, params.json says {params.layers} "
                    f"layer{'s' if params.layers > 1 else ''}: it is of another model; get the one "
                    "that belongs to these files"
                )
            raise IrqError(
                f"{header.path}: {name} is no tensor of a LLaMA: of Meta's files only text models "
                "of LLaMA are read"
            )


def _checked_tie(tensors: dict[str, TensorInfo]) -> TensorInfo:
    """The embedding, which the head has to equal when it is read."""
    both = (tensors["tok_embeddings.weight"], tensors["output.weight"])
    return lazy_info(both[0].name, both[0].dtype, both[0].shape, Replicas(both))


def _check_norms(tensors: dict[str, TensorInfo]) -> None:
    """What every part has to have alike is small, so it is compared before the work begins."""
    with TileReader() as reader:
        for info in tensors.values():
            if len(info.shape) == 1:
                reader.read_tensor(info)


def _dtype(headers: Sequence[ShardHeader]) -> str:
    return headers[0].tensors["layers.0.feed_forward.w1.weight"].dtype
