"""From a text file to windows of tokens: read, keep a held-out part, tokenize as one packed
stream, cut into windows that do not overlap."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError, UsageError

CHARACTERS_A_TOKEN = 64
"""So many of a long text are tokenized for each token that is wanted: some 4 make one."""


def read_text(path: str | Path) -> str:
    """Read a whole UTF-8 file, line ends untouched; a leading byte order mark is dropped.

    Raises `UsageError` where the file does not exist or is a folder; `IrqError` where it cannot be
    read, is empty, or is not UTF-8.
    """
    path = Path(path)
    with os_errors("read it", path):
        if not path.exists():
            raise UsageError(f"{path}: no such text file")
        if path.is_dir():
            raise UsageError(f"{path}: a folder, not a file; name a text file")
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IrqError(
            f"{path}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; "
            "convert the file to UTF-8"
        ) from None
    text = text.removeprefix("\ufeff")
    if not text:
        raise IrqError(f"{path}: the file is empty; give a file with text")
    return text


def split_text(text: str, fraction: float) -> tuple[str, str]:
    """Split at a fraction of the characters, moved forward to the start of the next line.

    The split depends on the text alone, not on a tokenizer: train on the first part, evaluate on
    the second, and no model sees a token of the other. Where no line starts after the point, the
    split is exactly there. `"".join(split_text(text, f)) == text` for every f in [0, 1).
    """
    point = int(fraction * len(text))
    if point > 0 and text[point - 1] != "\n":
        line_start = text.find("\n", point) + 1
        if 0 < line_start < len(text):
            point = line_start
    return text[:point], text[point:]


def encode_stream(tokenizer: Any, text: str, max_tokens: int | None = None) -> Tensor:
    """Tokenize the whole text as one stream: int64 `[tokens]`, at most `max_tokens` of them.

    Special tokens are those the tokenizer adds by default to one text: for most models a BOS at
    the very start and nothing between windows.
    """
    if max_tokens is not None:
        most = max_tokens * CHARACTERS_A_TOKEN
        if most < len(text):
            ids = encode_stream(tokenizer, text[:most])
            if len(ids) >= 2 * max_tokens:  # far from the cut, so that it has changed none of these
                return ids[:max_tokens]
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids[:max_tokens], dtype=torch.int64)


def cut_windows(ids: Tensor, context: int) -> list[Tensor]:
    """Cut `[tokens]` into consecutive windows of `context` tokens that do not overlap.

    Each window predicts all its tokens but the first. A last, shorter window is kept if it holds
    at least 2 tokens, that is, if it predicts one.

    Raises `UsageError` where the stream is shorter than one window.
    """
    if len(ids) < context:
        raise UsageError(
            f"the text gives {len(ids)} tokens, less than one window of {context}: "
            "give more text, more tokens or a smaller context"
        )
    return [window for window in ids.split(context) if len(window) >= 2]
