"""A prompt as tokens: a text to go on with, or a conversation in a model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from irq_convert.errors import UsageError, one_line

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""


def encode_text(tokenizer: Any, text: str, where: str) -> Tensor:
    """Token ids of a text to go on with, int64 `[1, tokens]`, with what the tokenizer puts first.

    Raises `UsageError` where there is no token to begin with; `where` names the model.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise UsageError(
            f"{where}: an empty prompt gives no token to begin with (its tokenizer puts none "
            "first): give a word"
        )
    return torch.tensor([ids], dtype=torch.int64)


def encode_chat(tokenizer: Any, messages: Sequence[Message], where: str) -> Tensor:
    """Token ids of a conversation up to where the answer begins, int64 `[1, tokens]`.

    Raises `UsageError` where the tokenizer has no chat template, or the template refuses the
    messages (a role that it does not know, two messages of one side); `where` names the model.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{where}: its tokenizer has no chat template, so nothing tells how it is spoken to: "
            "leave --chat out to go on with a text, or name a tokenizer that has one by --tokenizer"
        )
    try:
        found = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    except Exception as error:  # jinja2's many, and whatever a template does to its variables
        raise UsageError(
            f"{where}: its chat template refuses the messages: {one_line(error)}"
        ) from error
    ids: Tensor = found["input_ids"]
    return ids
