"""The output head beside the embeddings: what the files say of the two, whatever a flag says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from irq_convert.artifact.contents import Artifact
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.planned_folder import copied
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.state_dict import HEADS

FLAG = "tie_word_embeddings"
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")


def stored_head(artifact: Artifact) -> str | None:
    """Name of the head's weight in the files, None where there is none."""
    return _find(artifact, HEADS)


def head_differs(artifact: Artifact) -> bool:
    """Whether the files hold a head with other values than the embeddings.

    config.json may call such a head tied. transformers compares the two while it loads and keeps
    both, so every layout that is to give the same answers has to. Reads the two tensors unless
    names, shapes or config.json tell already. Raises `IrqError` where they cannot be read.
    """
    head, embedding = stored_head(artifact), _find(artifact, EMBEDDINGS)
    if head is None or embedding is None:
        return False
    if (artifact.checkpoint.config or {}).get("tie_word_embeddings") is False:
        return True
    found = {info.name: info for info in artifact.copied}
    if head not in found or embedding not in found:  # packed, so no longer the other's values
        return True
    return not _equal(found[head], found[embedding])


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json that ties no head to its embedding, nor do the configurations inside it."""

    def said(part: Mapping[str, Any]) -> dict[str, Any]:
        inside = {k: said(v) if isinstance(v, dict) else v for k, v in part.items()}
        return inside | ({FLAG: False} if FLAG in part else {})

    return said(config) | {FLAG: False}


def _find(artifact: Artifact, modules: tuple[str, ...]) -> str | None:
    """The one weight of a module of one of these names; None for none and for several."""
    names = [
        tensor.name
        for tensor in artifact.in_file_order()
        if tensor.name.endswith(".weight") and tensor.name.split(".")[-2] in modules
    ]
    return names[0] if len(names) == 1 else None


def _equal(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two copied tensors hold the same bytes, compared chunk by chunk."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with TileReader() as left, TileReader() as right:
        pairs = zip(copied(left, one), copied(right, other), strict=True)
        return all(a == b for (_, a, _), (_, b, _) in pairs)
