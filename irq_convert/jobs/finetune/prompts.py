"""From a row to pieces of text, each to be learned or only read; no tokens yet.

Kinds of rows, by their fields, the first that fits:

* `messages`: a conversation; the tokenizer's chat template, else headers as below;
* `prompt` and `completion`: as they are;
* `instruction` and `output`, perhaps `input`: headers as below;
* `text`: learned as a whole.

Without a template a part is a header line (`### Instruction:`), its text and a blank line; the
answer follows `### Response:` and a line break and ends with the tokenizer's end-of-text token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from irq_convert.errors import IrqError
from irq_convert.jobs.finetune.rows import DataRow

NEEDED = "instruction and output (perhaps input), prompt and completion, messages, or text"


@dataclass(frozen=True)
class TextPiece:
    """A stretch of text; `learned` is predicted, `ends` puts the end-of-text token behind it."""

    text: str
    learned: bool
    ends: bool = False


@dataclass(frozen=True)
class Script:
    """All pieces of an example; `templated` text holds its special tokens already."""

    pieces: tuple[TextPiece, ...]
    templated: bool = False


def script(row: DataRow, tokenizer: Any) -> Script:
    """The pieces of `row`.

    Raises `IrqError` where the row has none of the sets of fields, a field is not of its type or no
    Unicode text, or the chat template does not take the conversation.
    """
    found = _script(row, tokenizer)
    for piece in found.pieces:
        try:
            piece.text.encode()
        except UnicodeEncodeError as error:  # JSON can escape what no text can hold
            half = f"\\u{ord(piece.text[error.start]):04x}"
            raise IrqError(
                f"{row.where}: holds {half}, half of a pair, which is no character: write both "
                "halves or remove it"
            ) from None
    return found


def _script(row: DataRow, tokenizer: Any) -> Script:
    fields = row.fields
    if "messages" in fields:
        return _conversation(row, tokenizer)
    if {"prompt", "completion"} <= fields.keys():
        prompt, answer = _text(row, "prompt"), _text(row, "completion")
        return Script((TextPiece(prompt, False), TextPiece(answer, True, ends=True)))
    if {"instruction", "output"} <= fields.keys():
        prompt = _instruction(_text(row, "instruction"), _text(row, "input", optional=True))
        return Script((TextPiece(prompt, False), TextPiece(_text(row, "output"), True, ends=True)))
    if "text" in fields:
        return Script((TextPiece(_text(row, "text"), True, ends=True),))
    found = ", ".join(map(repr, fields)) or "none"
    raise IrqError(f"{row.where}: has the fields {found}; needed are {NEEDED}")


def _text(row: DataRow, field: str, optional: bool = False) -> str:
    value = row.fields.get(field)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise IrqError(f"{row.where}: {field!r} is {_kind(value)}, a string is needed")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _part(header: str, text: str) -> str:
    return f"### {header}:\n{text}\n\n"


def _instruction(instruction: str, given: str) -> str:
    """What precedes the answer to an instruction."""
    middle = _part("Input", given) if given else ""
    return f"{_part('Instruction', instruction)}{middle}### Response:\n"


def _conversation(row: DataRow, tokenizer: Any) -> Script:
    messages = _messages(row)
    if getattr(tokenizer, "chat_template", None):
        return Script(tuple(_render(row, messages, tokenizer)), templated=True)
    pieces: list[TextPiece] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            pieces += [TextPiece("### Assistant:\n", False), TextPiece(content, True, ends=True)]
        else:
            pieces.append(TextPiece(_part(role.capitalize(), content), False))
    return Script(tuple(pieces))


def _messages(row: DataRow) -> list[dict[str, str]]:
    """The conversation, checked: objects with `role` and `content`, one at least the model's."""
    raw = row.fields["messages"]
    if not isinstance(raw, list) or not raw:
        raise IrqError(f"{row.where}: 'messages' is {_kind(raw)}, a list of messages is needed")
    for number, message in enumerate(raw, 1):
        strings = isinstance(message, Mapping) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not strings:
            raise IrqError(
                f"{row.where}: message {number} has no 'role' and 'content' that are strings"
            )
    if not any(message["role"] == "assistant" for message in raw):
        raise IrqError(f"{row.where}: no message has the role 'assistant': nothing to learn")
    return raw


def _render(row: DataRow, messages: Sequence[dict[str, str]], tokenizer: Any) -> list[TextPiece]:
    """Pieces cut out of the rendered conversation: what each answer adds to what came before it.

    A template whose beginning changes with what follows (some drop earlier thoughts) can only be
    learned from at its last answer; then the text up to there is one piece.
    """
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    whole = _apply(row, messages[: turns[-1] + 1], tokenizer)
    starts = [(_apply(row, messages[:at], tokenizer, True), at) for at in turns]
    ends = [_apply(row, messages[: at + 1], tokenizer) for at in turns]
    stable = all(whole.startswith(text) for text in (*(s for s, _ in starts), *ends))
    if not stable:
        starts, ends = starts[-1:], ends[-1:]
    pieces, at = [], 0
    for (start, turn), end in zip(starts, ends, strict=True):
        if not end.startswith(start):  # without the header that a new answer would begin with
            start = _apply(row, messages[:turn], tokenizer)
        if not end.startswith(start):
            raise IrqError(
                f"{row.where}: the chat template changes what precedes an answer, so that the "
                "answer cannot be told from it; give rows with prompt and completion"
            )
        pieces += [
            TextPiece(whole[at : len(start)], False),
            TextPiece(whole[len(start) : len(end)], True),
        ]
        at = len(end)
    return [piece for piece in pieces if piece.text]


def _apply(
    row: DataRow, messages: Sequence[dict[str, str]], tokenizer: Any, prompt: bool = False
) -> str:
    if not messages:
        return ""
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # templates raise what they like
        reason = " ".join(str(error).split())[:200]
        raise IrqError(f"{row.where}: the chat template does not take it: {reason}") from None
    return text
