"""Tokens to pieces of text, as soon as they make whole characters."""

from __future__ import annotations

from typing import Any

_HALF = "\ufffd"
"""What the bytes of a character that is not complete decode to."""


class Pieces:
    """Text of a growing list of tokens, given out piece by piece.

    A token alone does not tell its text: spaces and characters depend on those before. So the last
    tokens are decoded with and without the new one, and the difference is what it adds.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._from = max(0, len(prompt) - 6)  # enough to know what comes before the first token
        self._told = len(prompt)

    def add(self, token: int) -> str:
        """What `token` adds; empty while a character is not complete."""
        self._ids.append(token)
        before, now = self._decode(self._told), self._decode(len(self._ids))
        if now.endswith(_HALF) or len(now) <= len(before):
            return ""
        return self._tell(before, now)

    def rest(self) -> str:
        """What was held back, though it is no whole character."""
        return self._tell(self._decode(self._told), self._decode(len(self._ids)))

    def _tell(self, before: str, now: str) -> str:
        self._from, self._told = self._told, len(self._ids)
        return now[len(before) :]

    def _decode(self, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[self._from : end], skip_special_tokens=True)
        return text
