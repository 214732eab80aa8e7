"""Rows of embeddings and heads that were trained alone: PEFT's `trainable_token_indices`.

The file holds the rows as they are after training, so they take the place of the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.errors import IrqError

KEY = "trainable_token_indices"
ROWS = ".token_adapter.trainable_tokens_delta"
"""How the name of such rows ends in an adapter's file."""


@dataclass(frozen=True)
class StoredTokens:
    """Rows `indices` of the weight of `module`: `rows` is `[indices, width]`."""

    module: str
    rows: TensorInfo
    indices: tuple[int, ...]


def check_tokens(path: Path, raw: Mapping[str, Any]) -> None:
    """Raise `IrqError` where the indices in settings `raw` are no list of tokens, or of modules."""
    found = raw.get(KEY) or []
    each = list(found.values()) if isinstance(found, dict) else [found]
    for tokens in each:
        if not isinstance(tokens, list) or not all(type(t) is int and t >= 0 for t in tokens):
            raise IrqError(f"{path}: {KEY} {found!r} must be a list of tokens, or one a module")


def stored_tokens(raw: Mapping[str, Any], module: str, rows: TensorInfo) -> StoredTokens:
    """Rows `rows` of `module`, with the tokens that settings `raw` have for it.

    A tied head follows its embedding and may be in the file without being in the settings. Raises
    `IrqError` for other numbers of rows and tokens, and for rows of no floating-point numbers.
    """
    found: Any = raw.get(KEY) or []
    if isinstance(found, dict):
        lists = [tokens for name, tokens in found.items() if f".{module}".endswith(f".{name}")]
        lists = lists or (list(found.values()) if len(found) == 1 else [])
        found = lists[0] if lists else []
    indices = tuple(found)
    if len(rows.shape) != 2 or rows.shape[0] != len(indices) or rows.dtype not in FLOATS:
        raise IrqError(
            f"{rows.shard.name}: {rows.name} {rows.dtype} {list(rows.shape)}: the settings have "
            f"{len(indices)} tokens for {module}: the adapter is damaged: save or download it again"
        )
    return StoredTokens(module, rows, indices)


def require_tokens(raw: Mapping[str, Any], found: Mapping[str, StoredTokens]) -> None:
    """Raise `IrqError` where settings `raw` name tokens of which nothing is in the file.

    Of the same tokens of a tied head and its embedding there is one copy.
    """
    wanted: Any = raw.get(KEY) or {}
    each = wanted if isinstance(wanted, dict) else {"": wanted}
    there = {tokens.indices for tokens in found.values()}
    for name, indices in each.items():
        if tuple(indices) not in there:
            raise IrqError(
                f"{KEY} names {len(indices)} tokens{name and f' of {name}'}, but no rows of tokens "
                "are in the file: the adapter is damaged: save or download it again"
            )
