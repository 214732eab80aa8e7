"""A tokenizer of plain words and texts of them, for models with a vocabulary of any size."""

from __future__ import annotations

import random
from pathlib import Path


def write_word_tokenizer(folder: Path, size: int, *, unknown: bool = False) -> None:
    """Put a tokenizer into `folder` that knows the words w0, w1, ... of `size` ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "w0"} if unknown else {}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)


def word_text(size: int, words: int, seed: int = 0) -> str:
    """A text of so many words of which each makes some others more likely."""
    draw = random.Random(seed)
    at, found = 0, []
    for _ in range(words):
        at = (at * 3 + draw.randrange(7)) % size
        found.append(f"w{at}")
    return " ".join(found)
