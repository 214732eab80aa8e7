"""What a source holds once its headers are put together, whatever its files look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from irq_convert.checkpoint.header import ShardHeader, TensorInfo
from irq_convert.errors import IrqError


@dataclass(frozen=True)
class SourceHints:
    """What is known of a source beside its files: its name, and what its user said.

    `headers_only`: no data can be read yet. `llama_version` is asked for where files do not tell.
    """

    called: str = ""
    headers_only: bool = False
    llama_version: str | None = None


@dataclass(frozen=True)
class Arranged:
    """Tensors by the names that transformers gives them, in file order, and config.json.

    `gone` are files beside the weights that mean nothing any more once these are read, `dropped`
    tensors that are left out, each with the reason in words. `unknown` says what `config` lacks,
    and with which option to tell it: the tensors can be read, a model of them cannot be made.
    `encoding` names how weights are stored that are read as dense ones, None where all are dense.
    """

    tensors: dict[str, TensorInfo]
    config: dict[str, Any] | None
    gone: tuple[str, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    unknown: str | None = None
    encoding: str | None = None


def merged(headers: Sequence[ShardHeader]) -> dict[str, TensorInfo]:
    """All tensors; `IrqError` for one that two files hold."""
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, info in header.tensors.items():
            if name in tensors:
                raise IrqError(
                    f"{header.path}: tensor {name!r} is also in {tensors[name].shard.name}; "
                    "keep one set of weight files in the folder"
                )
            tensors[name] = info
    return tensors
