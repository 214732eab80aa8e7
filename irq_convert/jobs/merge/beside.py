"""Whole tensors that an adapter brings: which take the place of the artifact's, and which are its.

PEFT saves embeddings and heads beside an adapter where the vocabulary was resized, and where they
are adapted, then unchanged. What equals the artifact's tensor changes nothing; what has more rows
is a larger vocabulary, for all embeddings and heads alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from irq_convert.artifact.adapter import StoredAdapter
from irq_convert.artifact.adapter_beside import is_embedding
from irq_convert.artifact.contents import Artifact, StoredTensor
from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.errors import IrqError
from irq_convert.hf.model_names import ModelNames
from irq_convert.jobs.merge.ties import Tie, equal_tensors

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
    artifact: Artifact, adapter: StoredAdapter, names: ModelNames, files: Files, ties: Sequence[Tie]
) -> Whole:
    """Find what the whole tensors of `adapter` are to `artifact`, `ties` those of its model.

    Raises `IrqError`, naming tensor and shapes, for one that the artifact lacks, of another shape,
    or quantized there, for copies that differ, and for a vocabulary that is larger in one place
    only.
    """
    found = Whole()
    tied = {key for tie in ties for key in tie.names}
    with TileReader() as reader:
        for key, info in adapter.again.items():
            requireequal_tensors(reader, info, adapter.saved[key])
        for tie in ties:
            _match_tie(reader, adapter, names, files, tie, found)
        for saved, into in ((adapter.bases, found.bases), (adapter.saved, found.saved)):
            for key, info in saved.items():
                if names.key(key) not in tied:
                    _match_one(reader, adapter, names, files, key, info, into)
    return Whole(found.saved, found.bases, _vocabulary(artifact, adapter, found, files))


def _match_tie(
    reader: TileReader,
    adapter: StoredAdapter,
    names: ModelNames,
    files: Files,
    tie: Tie,
    into: Whole,
) -> None:
    """What the adapter brings of tensors that are one: trained ones, and the one under adapters."""
    old, kept = files[tie.base], bool(adapter.config.raw.get("ensure_weight_tying"))
    named = {key: tie.names.get(names.key(key)) for key in (*adapter.saved, *adapter.bases)}
    trained = {k: i for k, i in adapter.saved.items() if named[k] and adapter.config.is_saved(k)}
    copies = {k: i for k, i in adapter.saved.items() if named[k] and k not in trained}
    under = {k: i for k, i in adapter.bases.items() if named[k]}
    for info in (*trained.values(), *copies.values(), *under.values()):
        _check_shape(adapter, info, tie.base, old)
    if kept and trained:  # PEFT trains one tensor for all of them
        first = next(iter(trained.values()))
        for info in (*trained.values(), *copies.values()):
            requireequal_tensors(reader, info, first)
        into.saved.update(dict.fromkeys(tie.names.values(), first))
        copies = {}
    into.saved.update({str(named[key]): info for key, info in trained.items()})
    beneath = [*copies.values(), *under.values()]
    for info in beneath[1:]:
        requireequal_tensors(reader, info, beneath[0])
    if not beneath or _unchanged(reader, beneath[0], old):
        return
    if beneath[0].shape == _shape(old) and (under or len(copies) < len(tie.names)):
        raise other_weights(beneath[0], tie.base)
    into.bases.update(dict.fromkeys(tie.names.values(), beneath[0]))


def requireequal_tensors(reader: TileReader, info: TensorInfo, other: TensorInfo) -> None:
    """Raise `IrqError` where two tensors of an adapter that are the same one differ."""
    if not equal_tensors(reader, info, other):
        raise IrqError(
            f"{info.shard.name}: {info.name} {list(info.shape)} and {other.name} "
            f"{list(other.shape)} stand for the same tensor and differ: the adapter is damaged: "
            "save it again"
        )


def other_weights(info: TensorInfo, name: str) -> IrqError:
    """For a copy of what was there before training that is not what the artifact has."""
    return IrqError(
        f"{info.shard.name}: {info.name} {list(info.shape)} is not {name} of the artifact: the "
        "adapter was trained on other weights"
    )


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
    # Where a class could be asked, ties are no matter of this function.
    tied = not names.known and (names.key(key) in names.tied or name in names.tied)
    if tied and not trained and name is None:
        # A tied head has no tensor: it is its embedding, if that is here and the same.
        twin = next(
            (other for other in adapter.saved if other != key and _tied(names, other)), None
        )
        if twin is not None and equal_tensors(reader, info, adapter.saved[twin]):
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
            raise other_weights(info, name)
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
    return set(ours) == set(names.tied) and all(
        equal_tensors(reader, info, o) for o in ours.values()
    )


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
    return isinstance(found, TensorInfo) and equal_tensors(reader, info, found)


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
