"""What a source brings to a text: its tokenizer, its longest context, its vocabulary."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.files import copy_file_atomic, write_bytes_atomic
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.hf.causal_lm import load_tokenizer

_FOR_TOKENIZERS = (
    "tokenizer",
    "special_tokens",
    "vocab",
    "merges",
    "chat_template",
    "added_tokens",
)


def source_tokenizer(
    folder: Path, made: Mapping[str, bytes], carried: Iterable[str], config: Mapping[str, Any]
) -> Any:
    """The tokenizer of the source in `folder`; `IrqError` where there is none.

    What is `made` for it stands for files that it lacks; `carried` are files of it that stay.
    """
    if not any(name.startswith(_FOR_TOKENIZERS) for name in made):
        return load_tokenizer(folder)
    with tempfile.TemporaryDirectory() as place:
        for name, data in made.items():
            write_bytes_atomic(Path(place) / name, data)
        for name in carried:
            if name.startswith(_FOR_TOKENIZERS):
                copy_file_atomic(folder / name, Path(place) / name)
        write_bytes_atomic(Path(place) / "config.json", json.dumps(dict(config)).encode())
        return load_tokenizer(place)


def checkpoint_tokenizer(checkpoint: Checkpoint) -> Any:
    """`source_tokenizer` of an opened checkpoint, in whatever format it is."""
    made: Mapping[str, bytes] = {}
    if checkpoint.source_format == "meta" and checkpoint.config is not None:
        from irq_convert.hf.meta_tokenizer import find_tokenizer, tokenizer_files

        found = find_tokenizer(checkpoint)
        made = {} if found is None else tokenizer_files(found, checkpoint.config)
    config = checkpoint.config or {}
    return source_tokenizer(checkpoint.folder, made, checkpoint.other_files, config)
