"""A row with `messages` as pieces of text: through the tokenizer's chat template, or plain headers.

Everything beside `messages` that the template asks for is given to it: `tools`, `documents`, and
any other field by its name (also those in `chat_template_kwargs`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from inspect import signature
from typing import Any

from irq_convert.errors import IrqError
from irq_convert.jobs.common.rows import DataRow
from irq_convert.jobs.finetune.script import Script, TextPiece, header_part, kind_of_value

OPTIONS = "chat_template_kwargs"
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


@dataclass(frozen=True)
class _Conversation:
    """A checked conversation; `given` are the template's variables, `unused` is what is left."""

    row: DataRow
    messages: Sequence[Mapping[str, Any]]
    given: Mapping[str, Any] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()


def conversation_script(row: DataRow, tokenizer: Any) -> Script:
    """The pieces of a conversation; raises `IrqError` as `prompts.script` does."""
    template = _template(row, tokenizer)
    talk = _read(row, template, tokenizer)
    if template is not None:
        return Script(tuple(_render(talk, tokenizer)), templated=True, unused=talk.unused)
    pieces: list[TextPiece] = []
    for message in talk.messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            answer = TextPiece(content, _says_something(message), ends=True)
            pieces += [TextPiece("### Assistant:\n", False), answer]
        else:
            pieces.append(TextPiece(header_part(role.capitalize(), content), False))
    return Script(tuple(pieces), unused=talk.unused)


def _template(row: DataRow, tokenizer: Any) -> str | None:
    """The text of the chat template, which may be another one where there are tools."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return str(tokenizer.get_chat_template(tools=row.fields.get("tools") or None))
    except Exception as error:  # several templates and none is the default, for one
        reason = " ".join(str(error).split())[:200]
        raise IrqError(
            f"{row.where}: the tokenizer has no chat template for it: {reason}"
        ) from None


@lru_cache
def template_variables(template: str) -> frozenset[str]:
    """The names that a template takes from outside; every word of one that cannot be parsed."""
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(_GENERATION.sub("", template))
    except TemplateError:
        return frozenset(re.findall(r"\w+", template))
    return frozenset(meta.find_undeclared_variables(parsed))


def _read(row: DataRow, template: str | None, tokenizer: Any) -> _Conversation:
    """Check the messages, and sort the fields around them into used and unused."""
    messages = _messages(row, template)
    fields = {k: v for k, v in row.fields.items() if k not in ("messages", OPTIONS)}
    more = row.fields.get(OPTIONS)
    fields |= more if isinstance(more, Mapping) else {}
    fields = {name: value for name, value in fields.items() if value not in (None, "", [], {})}
    known = template_variables(template) - _ours(tokenizer) if template else frozenset()
    given = {name: value for name, value in fields.items() if name in known}
    if isinstance(given.get("tools"), str):
        given["tools"] = _decoded(row, given["tools"])
    words = frozenset(re.findall(r"\w+", template or ""))
    inner = {
        key
        for message in messages
        for key, value in message.items()
        if key not in ("role", "content") and key not in words and value not in (None, "", [], {})
    }
    unused = {*(fields.keys() - given.keys()), *(f"messages.{key}" for key in inner)}
    return _Conversation(row, messages, given, frozenset(unused))


def _ours(tokenizer: Any) -> frozenset[str]:
    """What `apply_chat_template` takes that says how to write, which is not the row's to say."""
    names = signature(tokenizer.apply_chat_template).parameters
    return frozenset(("messages", *names)) - {"tools", "documents"}


def _decoded(row: DataRow, tools: str) -> Any:
    """Tools that a data set keeps as a string of JSON."""
    try:
        return json.loads(tools)
    except ValueError:
        raise IrqError(f"{row.where}: 'tools' is a string that is not JSON: give a list") from None


def _messages(row: DataRow, template: str | None) -> list[dict[str, Any]]:
    """The conversation, checked: objects with `role` and `content`, one at least the model's.

    An answer that only calls tools has no content; a template that writes calls can tell it.
    """
    raw = row.fields["messages"]
    if not isinstance(raw, list) or not raw:
        kind = kind_of_value(raw)
        raise IrqError(f"{row.where}: 'messages' is {kind}, a list of messages is needed")
    for number, message in enumerate(raw, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise IrqError(f"{row.where}: message {number} has no 'role' that is a string")
        if isinstance(message.get("content"), str):
            continue
        calls = message.get("content") is None and message.get("tool_calls")
        if not calls:
            raise IrqError(
                f"{row.where}: message {number} has no 'role' and 'content' that are strings"
            )
        if "tool_calls" not in (template or ""):
            raise IrqError(
                f"{row.where}: message {number} only calls tools, which "
                + ("the chat template does not write" if template else "needs a chat template")
                + ": name a tokenizer whose template does with --tokenizer"
            )
    if not any(message["role"] == "assistant" for message in raw):
        raise IrqError(f"{row.where}: no message has the role 'assistant': nothing to learn")
    return raw


def _render(talk: _Conversation, tokenizer: Any) -> list[TextPiece]:
    """Pieces cut out of the rendered conversation: what each answer adds to what came before it.

    A template whose beginning changes with what follows (some drop earlier thoughts) can only be
    learned from at its last answer; then the text up to there is one piece.
    """
    turns = [at for at, message in enumerate(talk.messages) if message["role"] == "assistant"]
    whole = _apply(talk, turns[-1] + 1, tokenizer)
    starts = [(_apply(talk, at, tokenizer, True), at) for at in turns]
    ends = [_apply(talk, at + 1, tokenizer) for at in turns]
    stable = all(whole.startswith(text) for text in (*(s for s, _ in starts), *ends))
    if not stable:
        starts, ends = starts[-1:], ends[-1:]
    pieces, at = [], 0
    for (start, turn), end in zip(starts, ends, strict=True):
        if not end.startswith(start):  # without the header that a new answer would begin with
            start = _apply(talk, turn, tokenizer)
        if not end.startswith(start):
            raise IrqError(
                f"{talk.row.where}: the chat template changes what precedes an answer, so that the "
                "answer cannot be told from it; give rows with prompt and completion"
            )
        pieces += [
            TextPiece(whole[at : len(start)], False),
            TextPiece(whole[len(start) : len(end)], _says_something(talk.messages[turn])),
        ]
        at = len(end)
    return [piece for piece in pieces if piece.text]


def _says_something(message: Mapping[str, Any]) -> bool:
    """Whether an answer has any content: what a template puts around none teaches silence."""
    found = (value for key, value in message.items() if key != "role")
    return any(bool(v.strip()) if isinstance(v, str) else bool(v) for v in found)


def _apply(talk: _Conversation, count: int, tokenizer: Any, prompt: bool = False) -> str:
    """The first `count` messages as the template writes them."""
    if not count:
        return ""
    try:
        text: str = tokenizer.apply_chat_template(
            list(talk.messages[:count]), tokenize=False, add_generation_prompt=prompt, **talk.given
        )
    except Exception as error:  # templates raise what they like
        reason = " ".join(str(error).split())[:200]
        raise IrqError(f"{talk.row.where}: the chat template does not take it: {reason}") from None
    return text
