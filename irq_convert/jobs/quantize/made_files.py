"""Files beside the weights that a source lacks and transformers needs, made of what it has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from irq_convert.checkpoint.layout import ORIGINAL
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.errors import UsageError


@dataclass(frozen=True)
class MadeFiles:
    """`files` by name, the source's files that they stand for, and remarks for a person."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def make_files(checkpoint: Checkpoint, *, tokenizer: bool = True) -> MadeFiles:
    """What a source in Meta's layout needs besides its tensors; nothing for all others.

    `tokenizer`: False leaves out the files of the tokenizer, which take seconds.
    Raises `UsageError` where its files do not tell what the model is, and `IrqError` for a damaged
    tokenizer.
    """
    if checkpoint.unknown is not None:
        raise UsageError(checkpoint.unknown)
    notes = _left_out(checkpoint.dropped)
    if any(name.startswith(ORIGINAL) for name in checkpoint.left_out):
        notes += (f"{ORIGINAL} is left out: it has the model once more, as it was first released",)
    if checkpoint.source_format != "meta" or checkpoint.config is None:
        return MadeFiles(notes=notes)
    from irq_convert.hf.meta_tokenizer import FILE, find_tokenizer, is_tiktoken, tokenizer_files

    config = checkpoint.config
    files = {"generation_config.json": _generation(config)}
    if not tokenizer:
        return MadeFiles(files, notes=notes)
    found = find_tokenizer(checkpoint)
    if found is None:
        home = checkpoint.shards[0].parent
        return MadeFiles(files, (), (*notes, f"{home}: no {FILE}: the result has no tokenizer"))
    files |= tokenizer_files(found, config)
    gone = (FILE, f"original/{FILE}") if is_tiktoken(found) else ()
    return MadeFiles(files, gone, notes)


def _left_out(dropped: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """A line for each reason: scales of FP8 are as many as there are layers."""
    reasons: dict[str, list[str]] = {}
    for name, why in dropped:
        reasons.setdefault(why, []).append(name)
    return tuple(
        f"{names[0]} is left out: {why}"
        if len(names) == 1
        else f"{names[0]} and {len(names) - 1} more are left out: {why}"
        for why, names in reasons.items()
    )


def _generation(config: Mapping[str, object]) -> bytes:
    chat = isinstance(config["eos_token_id"], list)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9} if chat else {}
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    return f"{json.dumps({**ids, **sampling}, indent=2)}\n".encode()
