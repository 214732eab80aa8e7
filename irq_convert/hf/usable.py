"""Whether a source can be run and quantized, from headers and config.json alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from irq_convert.artifact.manifest import CARD_NAME
from irq_convert.checkpoint.packed import find_native, find_packed
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError
from irq_convert.hf.whole import ask_wholeness, why_unloadable

_WANTED = "in float32, bfloat16 or float16"


def refuse_unusable(checkpoint: Checkpoint) -> None:
    """Raise `IrqError` for a source of which no artifact could be made that loads right.

    That is one that is quantized already, whose class nothing names, or that is not a whole model
    of its class. What a class needs that transformers does not know cannot be asked.
    """
    config, tensors, where = checkpoint.config, checkpoint.tensors, str(checkpoint.folder)
    original = _original(checkpoint)
    _refuse_quantized(config, where, original)
    found, unloadable = ask_wholeness(config, tensors), why_unloadable(config)
    packed, native = find_packed(tensors), find_native(tensors)
    if packed and (found.why or unloadable or not found.known):
        info = packed.info
        raise IrqError(
            f"{where}: already quantized: {info.name} {list(info.shape)} in {info.shard.name} is "
            f"{info.dtype}, packed by {packed.method}; give {original}, {_WANTED}"
        )
    if native and (found.lacks or unloadable):
        raise IrqError(
            f"{where}: has the layout of Meta or Mistral, which goes with params.json "
            f"({native.name} in {native.shard.name}); take the same model in the layout of "
            "transformers, with config.json (its repository often ends in -hf)"
        )
    if unloadable:
        raise IrqError(f"{where}: {unloadable}; copy the model's own config.json into the folder")
    if found.lacks:
        raise IrqError(
            f"{where}: not a whole model: {found.lacks}; get the files that are missing, or name "
            "in config.json, as architectures, the class that they are of"
        )
    if found.narrow:
        raise IrqError(f"{where}: already quantized: {found.narrow}; give {original}, {_WANTED}")


def _refuse_quantized(config: Mapping[str, Any] | None, where: str, original: str) -> None:
    parts = [config or {}, *(part for part in (config or {}).values() if isinstance(part, dict))]
    for found in filter(None, (part.get("quantization_config") for part in parts)):
        setting = found if isinstance(found, dict) else {}
        told = f"quant_method {setting.get('quant_method', 'unknown')!r}"
        if setting.get("quant_algo"):  # of modelopt, which has many
            told += f", quant_algo {setting['quant_algo']!r}"
        raise IrqError(f"{where}: already quantized ({told}); give {original}, {_WANTED}")


def _original(checkpoint: Checkpoint) -> str:
    """The original model in words, with its name where the card of a quantized one tells it."""
    name = None
    if CARD_NAME in checkpoint.other_files:
        with os_errors("read it", checkpoint.folder / CARD_NAME):
            text = (checkpoint.folder / CARD_NAME).read_text(encoding="utf-8", errors="replace")
        head = _CARD_HEAD.match(text)
        name = head and _BASE_MODEL.search(head[1])
    return f"the original model ({name[1]} by its card)" if name else "the original model"


_CARD_HEAD = re.compile(r"\ufeff?---\s*\n(.*?)\n---", re.DOTALL)
_BASE_MODEL = re.compile(r"^base_model:\s*(?:-\s*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)
