"""Tensors that the model has under several names, and an adapter that changes one of them.

PEFT's forward knows of no ties: a LoRA of an embedding, or a trained copy of it, leaves a tied head
as it was, and the other way round. So a merge writes what training had: where all names of a tensor
are changed alike it stays one, else each gets its own and config.json says that nothing is tied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from irq_convert.artifact.adapter import StoredAdapter, StoredLayer, read_layer
from irq_convert.artifact.adapter_tokens import StoredTokens
from irq_convert.artifact.contents import Artifact, StoredTensor
from irq_convert.artifact.head import untied_config
from irq_convert.checkpoint.buffers import torch_dtype
from irq_convert.checkpoint.header import TensorInfo, matrix_shape
from irq_convert.checkpoint.reader import TileReader
from irq_convert.errors import IrqError
from irq_convert.hf.model_names import ModelNames, tied_without_flag

TILE = 1 << 22
Change = TensorInfo | StoredLayer | StoredTokens
"""What an adapter does to a tensor: takes its place, is added to it, or takes the place of rows."""


@dataclass(frozen=True)
class Tie:
    """Keys of the model for one tensor: by key, its name in the files, or that it would have.

    `base` is the name of the tensor that the files hold. `nameless` are keys that could not be
    written. `embedding` is the name that the input goes through, where one of them is.
    """

    names: Mapping[str, str]
    base: str
    nameless: tuple[str, ...] = ()
    embedding: str | None = None


def find_ties(
    names: ModelNames, keys: Collection[str], files: Mapping[str, StoredTensor | TensorInfo]
) -> list[Tie]:
    """The ties that one of `keys` is part of.

    Files may hold a tensor under each of its names; where those differ, or one is packed,
    transformers does not tie them, and there is no tie here.
    """
    asked = {names.key(key) for key in keys}
    found = []
    for group in names.groups:
        if not group & asked:
            continue
        called = {key: names.tensors.get(key) or names.absent.get(key) for key in sorted(group)}
        there = [files[name] for name in called.values() if name is not None and name in files]
        dense = [info for info in there if isinstance(info, TensorInfo)]
        if not there or len(dense) < len(there) or not _all_equal(dense):
            continue
        known = {key: name for key, name in called.items() if name is not None}
        inputs = [n for k, n in known.items() if k.removesuffix(".weight") in names.embeddings]
        nameless = tuple(key for key in called if key not in known)
        found.append(Tie(known, dense[0].name, nameless, inputs[0] if inputs else None))
    return found


def _all_equal(tensors: list[TensorInfo]) -> bool:
    with TileReader() as reader:
        return all(equal_tensors(reader, tensors[0], other) for other in tensors[1:])


def equal_tensors(reader: TileReader, info: TensorInfo, other: TensorInfo) -> bool:
    """Whether `info` has the numbers of `other`, in its own dtype."""
    if info.shape != other.shape:
        return False
    rows, cols = matrix_shape(info)
    step = max(1, TILE // max(1, cols))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        mine, theirs = (reader.read_rows(each, start, stop).clone() for each in (info, other))
        if not torch.equal(mine, theirs.to(torch_dtype(info.dtype))):
            return False
    return True


def stays_one(adapter: StoredAdapter, tie: Tie, changes: Mapping[str, Change]) -> bool:
    """Whether all names of the tensor are changed alike, or none is."""
    found = [changes.get(name) for name in (*tie.names.values(), *tie.nameless)]
    with TileReader() as reader:
        return all(_same(reader, adapter, found[0], other) for other in found[1:])


def _same(
    reader: TileReader, adapter: StoredAdapter, one: Change | None, other: Change | None
) -> bool:
    if isinstance(one, TensorInfo) and isinstance(other, TensorInfo):
        return equal_tensors(reader, one, other)
    if isinstance(one, StoredTokens) and isinstance(other, StoredTokens):
        return one.indices == other.indices and equal_tensors(reader, one.rows, other.rows)
    if isinstance(one, StoredLayer) and isinstance(other, StoredLayer):
        first, second = (read_layer(reader, adapter.config, layer) for layer in (one, other))
        same = torch.equal(first.a, second.a) and torch.equal(first.b, second.b)
        return same and (first.beta, one.scaling) == (second.beta, other.scaling)
    return one is None and other is None


def require_untied(artifact: Artifact, adapter: StoredAdapter, ties: Collection[Tie]) -> None:
    """Raise `IrqError` where the tensors of `ties` cannot be written as tensors of their own."""
    if not ties:
        return
    always = tied_without_flag(untied_config(artifact.checkpoint.config or {}))
    for tie in ties:
        stuck = [*tie.nameless, *(key for key in tie.names if key in always)]
        if stuck:
            raise IrqError(
                f"{adapter.folder}: changes one of {', '.join((*tie.names, *tie.nameless))}, which "
                "the model ties whatever its config.json says, so that a merge would change all: "
                "merge --to adapter, or train without it"
            )
