"""Conversations with tools and other fields: what the chat template is given, and what is told.

The oracle is `apply_chat_template` with the row's fields, as a user of transformers calls it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from irq_convert.errors import IrqError
from irq_convert.jobs.common.rows import DataRow
from irq_convert.jobs.finetune.data import load_data
from irq_convert.jobs.finetune.encode import encode_script
from irq_convert.jobs.finetune.prompts import script
from tests.jobs.finetune.test_encode import learned

TEMPLATE = """\
{%- if tools %}[tools]{% for tool in tools %}{{ tool | tojson }}{% endfor %}|{% endif %}
{%- for d in documents or [] %}[doc]{{ d.text }}|{% endfor %}
{%- if mood is defined %}[mood]{{ mood }}|{% endif %}
{%- for m in messages %}[{{ m.role }}]
{%- if m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}<call>{{ call.function.name }}{% endfor %}
{%- if m.role == 'assistant' %}</s>{% else %}|{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
ASK, ANSWER = {"role": "user", "content": "Look."}, {"role": "assistant", "content": "A cat."}
ROW = {"messages": [ASK, CALL, {"role": "tool", "content": "cat"}, ANSWER], "tools": TOOLS}


def text_of(fields: dict[str, Any], tokenizer: Any) -> str:
    return "".join(piece.text for piece in script(DataRow("row 7", fields), tokenizer).pieces)


def rendered(fields: dict[str, Any], tokenizer: Any, **more: Any) -> str:
    text: str = tokenizer.apply_chat_template(fields["messages"], tokenize=False, **more)
    return text


@pytest.fixture
def templated(tokenizer: Any) -> Any:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_tools_reach_the_template_and_calls_are_learned(templated: Any) -> None:
    found = script(DataRow("row 7", ROW), templated)
    assert text_of(ROW, templated) == rendered(ROW, templated, tools=TOOLS)
    assert text_of(ROW, templated).startswith('[tools]{"type": "function"')
    assert learned(encode_script(found, templated), templated) == "<call>look</s>A cat.</s>"
    assert found.unused == frozenset()


def test_tools_as_a_string_of_json(templated: Any) -> None:
    assert text_of(ROW | {"tools": json.dumps(TOOLS)}, templated) == text_of(ROW, templated)
    with pytest.raises(IrqError, match="row 7: 'tools' is a string that is not JSON"):
        text_of(ROW | {"tools": "look"}, templated)


@pytest.mark.parametrize("empty", [None, []])
def test_no_tools(templated: Any, empty: Any) -> None:
    plain = {"messages": ROW["messages"]}
    assert text_of(plain | {"tools": empty}, templated) == text_of(plain, templated)


def test_documents_and_other_variables(templated: Any) -> None:
    more = {"documents": [{"title": "", "text": "Of cats."}], "mood": "calm"}
    wanted = rendered(ROW, templated, tools=TOOLS, **more)
    assert "[doc]Of cats.|[mood]calm|" in wanted
    assert text_of(ROW | more, templated) == wanted
    inner = {"documents": more["documents"], "chat_template_kwargs": {"mood": "calm"}}
    assert text_of(ROW | inner, templated) == wanted


def test_a_template_of_its_own_for_tools(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": TEMPLATE}
    assert text_of(ROW, tokenizer).startswith("[tools]")


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_calls_that_nothing_would_write(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    with pytest.raises(IrqError, match="row 7: message 2 only calls tools, which"):
        text_of(ROW, tokenizer)


def test_fields_that_go_nowhere_are_named_once(templated: Any, tmp_path: Path) -> None:
    """Also those within messages, and beside instructions; empty ones say nothing."""
    path = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [
        {"messages": [ASK, ANSWER | {"weight": 1}], "source": "a", "tools": [], "tokenize": True},
        {"messages": [ASK, ANSWER | {"name": ""}], "source": "b", "mood": "calm"},
        {"instruction": "Count.", "input": "a cat", "output": "One.", "system": "Be brief."},
        {"prompt": "x", "completion": "y", "id": 0},
        {"text": "z", "url": None},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = load_data(path, None, templated, length=64, holdout=0.4, vocabulary=None)
    assert found.unused == ("id", "messages.weight", "source", "system", "tokenize")


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_an_empty_answer_teaches_nothing(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    silent = {"role": "assistant", "content": " "}
    found = script(DataRow("row 7", {"messages": [ASK, silent, ASK, ANSWER]}), tokenizer)
    assert learned(encode_script(found, tokenizer), tokenizer) == "A cat.</s>"
    none = script(DataRow("row 7", {"messages": [ASK, silent]}), tokenizer)
    assert learned(encode_script(none, tokenizer), tokenizer) == ""
