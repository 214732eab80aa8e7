"""What a row says, as pieces of text, each to be learned or only read; no tokens yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextPiece:
    """A stretch of text; `learned` is predicted, `ends` puts the end-of-text token behind it."""

    text: str
    learned: bool
    ends: bool = False


@dataclass(frozen=True)
class Script:
    """All pieces of an example; `templated` text holds its special tokens already.

    `unused` are fields of the row that say something and went into no piece.
    """

    pieces: tuple[TextPiece, ...]
    templated: bool = False
    unused: frozenset[str] = frozenset()


def header_part(header: str, text: str) -> str:
    """A header line, its text and a blank line."""
    return f"### {header}:\n{text}\n\n"


def kind_of_value(value: Any) -> str:
    """The type of a JSON value, for messages."""
    return "null" if value is None else f"of type {type(value).__name__}"
