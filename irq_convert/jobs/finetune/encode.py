"""From pieces of text to token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from irq_convert.jobs.finetune.script import Script

IGNORED = -100
"""Label of a token that is not to be predicted: transformers' and torch's convention."""


@dataclass(frozen=True)
class Example:
    """`ids` and `labels`, int64 `[T]`; a label is its id, or `IGNORED`."""

    ids: Tensor
    labels: Tensor

    @property
    def learned(self) -> int:
        """Tokens that are predicted; the first of an example never is."""
        return int((self.labels[1:] != IGNORED).sum())


def encode_script(script: Script, tokenizer: Any) -> Example:
    """Tokenize the pieces of a script one after the other.

    The tokens before an answer are those that the prompt alone would give, as at inference. Where
    the text so far tokenizes to what is there and something more, the new tokens are that; else
    the piece is tokenized by itself.
    """
    ids: list[int] = []
    labels: list[int] = []
    text = ""
    for piece in script.pieces:
        text += piece.text
        whole = _tokens(tokenizer, text, special=not script.templated)
        if whole[: len(ids)] == ids:
            new = whole[len(ids) :]
        else:
            new = _tokens(tokenizer, piece.text, special=False)
        if piece.ends and tokenizer.eos_token_id is not None:
            new = [*new, tokenizer.eos_token_id]
        ids += new
        labels += new if piece.learned else [IGNORED] * len(new)
    return Example(torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64))


def _tokens(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Ids of `text`, with `special` those that begin a text; one put at its end is taken off."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    if special and ids and ids[-1] == end:
        own = _tokens(tokenizer, text, special=False)
        return ids[:-1] if _count_at_end(ids, end) > _count_at_end(own, end) else ids
    return ids


def _count_at_end(ids: Sequence[int], end: int) -> int:
    return sum(1 for _ in takewhile(end.__eq__, reversed(ids)))


class Collator:
    """Pads the examples of a batch on the right, to the longest."""

    def __init__(self, pad: int) -> None:
        self._pad = pad

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels`, int64 `[batch, longest]`."""
        lengths = torch.tensor([len(example.ids) for example in examples])
        shape = (len(examples), int(lengths.max()))
        ids = torch.full(shape, self._pad, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = example.ids
            labels[row, : len(example.ids)] = example.labels
        mask = torch.arange(shape[1])[None, :] < lengths[:, None]
        return {"input_ids": ids, "attention_mask": mask.to(torch.int64), "labels": labels}


def padding_id(tokenizer: Any, vocabulary: int) -> int:
    """Any id does, as padding is masked: the tokenizer's own, its end of text, or 0.

    It has to be below `vocabulary`, the rows of the embedding: a padding token that was added to a
    tokenizer often has none.
    """
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None and 0 <= found < vocabulary:
            return int(found)
    return 0
