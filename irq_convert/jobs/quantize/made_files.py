"""Files beside the weights that a source lacks and transformers needs, made of what it has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from irq_convert.checkpoint.source import Checkpoint
from irq_convert.errors import UsageError


@dataclass(frozen=True)
class MadeFiles:
    """`files` by name, the source's files that they stand for, and remarks for a person."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def make_files(checkpoint: Checkpoint) -> MadeFiles:
    """What a source in Meta's layout needs besides its tensors; nothing for all others.

    Raises `UsageError` where its files do not tell what the model is, and `IrqError` for a damaged
    tokenizer.
    """
    if checkpoint.unknown is not None:
        raise UsageError(checkpoint.unknown)
    notes = tuple(f"{name} is left out: {why}" for name, why in checkpoint.dropped)
    if checkpoint.source_format != "meta" or checkpoint.config is None:
        return MadeFiles(notes=notes)
    from irq_convert.hf.meta_tokenizer import FILE, is_tiktoken, tokenizer_files

    config = checkpoint.config
    files = {"generation_config.json": _generation(config)}
    home = checkpoint.shards[0].parent
    found = next((at for at in _places(checkpoint, home, FILE) if at.is_file()), None)
    if found is None:
        return MadeFiles(files, (), (*notes, f"{home}: no {FILE}: the result has no tokenizer"))
    files |= tokenizer_files(found, config)
    gone = (FILE, f"original/{FILE}") if is_tiktoken(found) else ()
    return MadeFiles(files, gone, notes)


def _places(checkpoint: Checkpoint, home: Path, name: str) -> list[Path]:
    """Beside the weights, in the folder, and above it, where LLaMA 1 keeps one for all sizes."""
    above = [] if checkpoint.repo_id else [checkpoint.folder.resolve().parent / name]
    return [home / name, checkpoint.folder / name, *above]


def _generation(config: Mapping[str, object]) -> bytes:
    chat = isinstance(config["eos_token_id"], list)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9} if chat else {}
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    return f"{json.dumps({**ids, **sampling}, indent=2)}\n".encode()
