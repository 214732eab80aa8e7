"""Whole tensors that an adapter brings: which take the place of the artifact's, and which are its.

PEFT saves embeddings and heads beside an adapter where the vocabulary was resized, and where they
are adapted, then unchanged. What equals the artifact's tensor changes nothing; what has more rows
is a larger vocabulary, for all embeddings and heads alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from irq_convert.artifact.adapter import StoredAdapter
from irq_convert.artifact.adapter_beside import is_embedding
from irq_convert.artifact.contents import Artifact, StoredTensor
from irq_convert.checkpoint.buffers import torch_dtype
from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.header import TensorInfo, matrix_shape
from irq_convert.checkpoint.reader import TileReader
from irq_convert.errors import IrqError
from irq_convert.hf.model_names import ModelNames

TILE = 1 << 22
Files = Mapping[str, StoredTensor | TensorInfo]


@dataclass(frozen=True)
class Vocabulary:
    """Rows of embeddings and heads before and after."""

    old: int
    new: int

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json with the new size wherever it says the old one."""
        found = {
            key: self.config(value) if isinstance(value, dict) else value
            for key, value in config.items()
        }
        return found | ({"vocab_size": self.new} if found.get("vocab_size") == self.old else {})


@dataclass(frozen=True)
class Whole:
    """By tensor of the artifact: what takes its place, and what is the base of an adapted layer."""

    saved: dict[str, TensorInfo] = field(default_factory=dict)
    bases: dict[str, TensorInfo] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None


def match_whole(
    artifact: Artifact, adapter: StoredAdapter, names: ModelNames, files: Files
) -> Whole:
    """Find what the whole tensors of `adapter` are to `artifact`.

    Raises `IrqError`, naming tensor and shapes, for one that the artifact lacks, of another shape,
    quantized there or tied to another, for copies that differ, and for a vocabulary that is larger
    in one place only.
    """
    found = Whole()
    with TileReader() as reader:
        for key, info in adapter.again.items():
            trained = adapter.saved[key]
            if not _equal(reader, info, trained):
                raise IrqError(
                    f"{info.shard.name}: {info.name} and {trained.name} stand for the same tensor "
                    f"{list(info.shape)} and differ: the adapter is damaged: save it again"
                )
        for saved, into in ((adapter.bases, found.bases), (adapter.saved, found.saved)):
            for key, info in saved.items():
                _match_one(reader, adapter, names, files, key, info, into)
    return Whole(found.saved, found.bases, _vocabulary(artifact, adapter, found, files))


def _match_one(
    reader: TileReader,
    adapter: StoredAdapter,
    names: ModelNames,
    files: Files,
    key: str,
    info: TensorInfo,
    into: dict[str, TensorInfo],
) -> None:
    trained = adapter.config.is_saved(key)
    name = names.tensor(key, files)
    tied = names.key(key) in names.tied or name in names.tied
    if tied and not trained and name is None:
        # A tied head has no tensor: it is its embedding, if that is here and the same.
        twin = next(
            (other for other in adapter.saved if other != key and _tied(names, other)), None
        )
        if twin is not None and _equal(reader, info, adapter.saved[twin]):
            return
    if name is None and not tied:
        raise IrqError(
            f"{adapter.folder}: saves {key} {list(info.shape)} whole, which the artifact does not "
            "have: it belongs to another model, or to one with a new head; quantize that one"
        )
    if name is not None:
        _check_shape(adapter, info, name, files[name])
        if not trained and _unchanged(reader, info, files[name]):
            return
        if not trained and info.shape == _shape(files[name]) and key in adapter.bases:
            raise IrqError(
                f"{info.shard.name}: {info.name} {list(info.shape)} is not {name} of the artifact: "
                "the adapter was trained on other weights"
            )
    if name is None or (tied and not _all_tied(reader, adapter, names, info)):
        raise IrqError(
            f"{adapter.folder}: changes {key}, which the model ties to another weight, so that a "
            "merge would change both: train without it"
        )
    into[name] = info


def _tied(names: ModelNames, key: str) -> bool:
    return names.key(key) in names.tied


def _all_tied(
    reader: TileReader, adapter: StoredAdapter, names: ModelNames, info: TensorInfo
) -> bool:
    """Whether the adapter brings every one of the tied tensors, and all of them equal."""
    ours = {names.key(key): each for key, each in adapter.saved.items() if _tied(names, key)}
    return set(ours) == set(names.tied) and all(_equal(reader, info, o) for o in ours.values())


def _shape(found: StoredTensor | TensorInfo) -> tuple[int, ...]:
    return found.source_shape if isinstance(found, StoredTensor) else found.shape


def _check_shape(
    adapter: StoredAdapter, info: TensorInfo, name: str, found: StoredTensor | TensorInfo
) -> None:
    if isinstance(found, StoredTensor):
        raise IrqError(
            f"{adapter.folder}: saves {name} whole, which is quantized in the artifact: train it "
            "with LoRA, or keep it dense when quantizing (--keep)"
        )
    resized = is_embedding(name) and info.shape and info.shape[1:] == found.shape[1:]
    if info.shape != found.shape and not resized:
        raise IrqError(
            f"{info.shard.name}: {info.name} is {list(info.shape)}, {name} of the artifact "
            f"{list(found.shape)}: it belongs to another model"
        )
    if info.dtype != found.dtype and not {info.dtype, found.dtype} <= set(FLOATS):
        raise IrqError(
            f"{info.shard.name}: {info.name} is {info.dtype}, {name} of the artifact "
            f"{found.dtype}: it belongs to another model"
        )


def _unchanged(reader: TileReader, info: TensorInfo, found: StoredTensor | TensorInfo) -> bool:
    return isinstance(found, TensorInfo) and _equal(reader, info, found)


def _equal(reader: TileReader, info: TensorInfo, other: TensorInfo) -> bool:
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


def _vocabulary(
    artifact: Artifact, adapter: StoredAdapter, whole: Whole, files: Files
) -> Vocabulary | None:
    """The sizes, where the adapter brings embeddings with other rows than the artifact's."""
    brought = {**whole.bases, **whole.saved}
    resized = {
        name: (_shape(files[name])[0], info.shape[0])
        for name, info in brought.items()
        if info.shape != _shape(files[name])
    }
    if not resized:
        return None
    first, sizes = min(resized.items())
    old, new = sizes
    shapes = f"{list(brought[first].shape)} for {list(_shape(files[first]))}"
    for name, found in files.items():
        if is_embedding(name) and _shape(found)[0] == old and resized.get(name) != sizes:
            here = brought[name].shape[0] if name in brought else "none"
            raise IrqError(
                f"{adapter.folder}: has {new} rows of {first}, of which the artifact has {old} "
                f"({shapes}), but {here} of {name}: the new rows are lost; name its module in "
                "modules_to_save and train again"
            )
    vocabulary, config = Vocabulary(old, new), artifact.checkpoint.config or {}
    if vocabulary.config(config) == config:
        raise IrqError(
            f"{adapter.folder}: has {new} rows of {first}, of which the artifact has {old} "
            f"({shapes}), but its config.json nowhere says vocab_size {old}, so no new size can be "
            "written there: resize the vocabulary before quantizing"
        )
    return vocabulary
