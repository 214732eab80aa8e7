"""What a model can take: how many tokens at once, and which."""

from __future__ import annotations

from typing import Any

import torch

from irq_convert.errors import UsageError


def longest_context(config: Any) -> int | None:
    """The most tokens that a model of `config` takes at once, where it says."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if most is not None and most > 0 else None


def fit_window(config: Any, window: int | None, default: int, option: str) -> int:
    """`window`, or where it is None `default` tokens, at most as many as a model of `config` takes.

    Raises `UsageError` naming `option` for a `window` that is longer.
    """
    if window is None:
        return min(default, longest_context(config) or default)
    check_context(config, window, option)
    return window


def check_context(config: Any, window: int, option: str) -> None:
    """Raise `UsageError` naming `option` for a window longer than a model of `config` takes."""
    most = longest_context(config)
    if most is not None and most < window:
        raise UsageError(
            f"{option} {window} is longer than the model's context of {most} tokens: give at most "
            "those"
        )


def check_vocabulary(model: Any, ids: torch.Tensor) -> None:
    """Raise `UsageError` for tokens that the embeddings of `model` do not have.

    They would be an index error, and on a GPU a dead context.
    """
    size = model.get_input_embeddings().weight.shape[0]
    largest = int(ids.max())
    if largest >= size:
        raise UsageError(
            f"the tokenizer gives id {largest}, but the model's embedding has {size} rows: the "
            "tokenizer belongs to another model"
        )
