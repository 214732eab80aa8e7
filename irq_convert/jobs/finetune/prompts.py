"""From a row to pieces of text, each to be learned or only read; no tokens yet.

Kinds of rows, by their fields, the first that fits:

* `messages`: a conversation, and what else the tokenizer's chat template asks for; without a
  template headers as below;
* `prompt` and `completion`: as they are;
* `instruction` and `output`, perhaps `input`: headers as below;
* `text`: learned as a whole.

Without a template a part is a header line (`### Instruction:`), its text and a blank line; the
answer follows `### Response:` and a line break and ends with the tokenizer's end-of-text token.
"""

from __future__ import annotations

from typing import Any

from irq_convert.errors import IrqError
from irq_convert.jobs.common.rows import DataRow
from irq_convert.jobs.finetune.conversation import conversation_script
from irq_convert.jobs.finetune.script import Script, TextPiece, header_part, kind_of_value

NEEDED = "instruction and output (perhaps input), prompt and completion, messages, or text"


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
        return conversation_script(row, tokenizer)
    if {"prompt", "completion"} <= fields.keys():
        prompt, answer = _text(row, "prompt"), _text(row, "completion")
        return _answered(row, prompt, answer, "prompt", "completion")
    if {"instruction", "output"} <= fields.keys():
        prompt = _instruction(_text(row, "instruction"), _text(row, "input", optional=True))
        return _answered(row, prompt, _text(row, "output"), "instruction", "input", "output")
    if "text" in fields:
        return Script((TextPiece(_text(row, "text"), True, ends=True),), unused=_rest(row, "text"))
    found = ", ".join(map(repr, fields)) or "none"
    raise IrqError(f"{row.where}: has the fields {found}; needed are {NEEDED}")


def _answered(row: DataRow, prompt: str, answer: str, *used: str) -> Script:
    pieces = (TextPiece(prompt, False), TextPiece(answer, True, ends=True))
    return Script(pieces, unused=_rest(row, *used))


def _rest(row: DataRow, *used: str) -> frozenset[str]:
    """Fields that say something and are not among `used`."""
    empty: tuple[Any, ...] = (None, "", [], {})
    return frozenset(k for k, v in row.fields.items() if k not in used and v not in empty)


def _text(row: DataRow, field: str, optional: bool = False) -> str:
    value = row.fields.get(field)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise IrqError(f"{row.where}: {field!r} is {kind_of_value(value)}, a string is needed")
    return value


def _instruction(instruction: str, given: str) -> str:
    """What precedes the answer to an instruction."""
    middle = header_part("Input", given) if given else ""
    return f"{header_part('Instruction', instruction)}{middle}### Response:\n"
