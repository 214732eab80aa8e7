"""Scores of a SentencePiece-like tokenizer, from its merges, and how llama.cpp uses them.

llama.cpp joins the two neighbours whose union has the highest score, the first of equals, until no
union is a token. BPE applies the first merge of its list. The two are one when the score of a token
falls with the place of the first merge that makes it, as in SentencePiece's own model files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gguf import TokenType

SPACE = "\u2581"
"""What stands for a space in the tokens."""


def merge_scores(raw: Mapping[str, Any], count: int) -> list[float]:
    """The score of each of `count` tokens of tokenizer.json `raw`; 0 for bytes and added tokens.

    Tokens that no merge makes come after all others.
    """
    merges, vocab = raw["model"]["merges"], raw["model"]["vocab"]
    last = float(-len(merges))
    added = {token["id"] for token in raw["added_tokens"]}
    scores = [0.0] * count
    for text, number in vocab.items():
        if number not in added and not text.startswith("<0x"):
            scores[number] = last
    for rank in range(len(merges) - 1, -1, -1):
        pair = merges[rank]
        left, right = pair if isinstance(pair, list) else pair.split(" ", 1)
        number = vocab.get(left + right)
        if number is not None and number not in added:
            scores[number] = float(-rank)
    return scores


def spm_encoder(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], prefix: bool
) -> Callable[[str], list[int]]:
    """llama.cpp's way from a text without special tokens to ids, for comparing; slow but exact.

    `prefix`: a space is put before the text.
    """
    ids: dict[str, int] = {}
    for number, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED):
            ids.setdefault(text, number)
    of_bytes = {
        int(text[3:5], 16): number
        for number, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == TokenType.BYTE
    }

    def encode(text: str) -> list[int]:
        parts = list((SPACE if prefix and text else "") + text.replace(" ", SPACE))
        while True:
            best = None
            for at in range(len(parts) - 1):
                number = ids.get(parts[at] + parts[at + 1])
                if number is not None and (best is None or scores[number] > best[0]):
                    best = scores[number], at
            if best is None:
                break
            at = best[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found = []
        for part in parts:
            known = ids.get(part)
            found += [known] if known is not None else [of_bytes.get(b, 0) for b in part.encode()]
        return found

    return encode
