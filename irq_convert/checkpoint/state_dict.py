"""State dicts of torch as a checkpoint: the names that transformers knows, each tensor once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.arranged import Arranged, SourceHints, merged
from irq_convert.checkpoint.header import ShardHeader, TensorInfo

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and Lightning put before every name."""
_OWN_MODEL = ("model.model.", "model.lm_head.", "model.transformer.")
HEADS = ("lm_head", "embed_out", "output")
"""Last parts of the names of output heads."""


def arrange_pickles(
    headers: Sequence[ShardHeader], folder: Path, config: dict[str, Any] | None, hints: SourceHints
) -> Arranged:
    """The tensors of all files, without the prefixes of training programs.

    A head that is a view of the embedding's storage is left out where config.json says that the
    two are tied, as save_pretrained leaves it out. Raises `IrqError` for a name in two files.
    """
    tensors = merged(headers)
    prefix = _common_prefix(list(tensors))
    named = {name.removeprefix(prefix): info for name, info in tensors.items()}
    named = {name: replace(info, name=name) for name, info in named.items()}
    dropped = []
    if (config or {}).get("tie_word_embeddings") is True:
        for name in _second_names(named):
            del named[name]
            dropped.append((name, "is the embedding under a second name"))
    return Arranged(named, config, dropped=tuple(dropped))


def _common_prefix(names: list[str]) -> str:
    """Wrappers before all of `names`; "model." only where the model's own names follow."""
    found = ""
    while True:
        rest = [name.removeprefix(found) for name in names]
        own = any(name.startswith(_OWN_MODEL) for name in rest)
        wraps = [w for w in PREFIXES if all(name.startswith(w) for name in rest)]
        wraps = [w for w in wraps if w != "model." or own]
        if not wraps:
            return found
        found += wraps[0]


def _second_names(tensors: dict[str, TensorInfo]) -> list[str]:
    """Heads whose bytes are those of another tensor."""
    places: dict[tuple[object, ...], list[str]] = {}
    for name, info in tensors.items():
        places.setdefault((info.shard, info.offset, info.shape, info.lazy), []).append(name)
    shared = [name for names in places.values() if len(names) > 1 for name in names]
    return [name for name in shared if name.rpartition(".")[0].rpartition(".")[2] in HEADS]
