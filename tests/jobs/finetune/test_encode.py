"""Rows to tokens: what is learned, what is only read, and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from irq_convert.errors import IrqError
from irq_convert.jobs.common.rows import DataRow
from irq_convert.jobs.finetune.encode import IGNORED, Collator, Example, encode_script, padding_id
from irq_convert.jobs.finetune.prompts import script

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% else %}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def row(**fields: Any) -> DataRow:
    return DataRow("data.json: row 7", fields)


def learned(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode(example.ids[example.labels != IGNORED])


def read(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode(example.ids[example.labels == IGNORED])


def messages(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_an_instruction_row(tokenizer: Any) -> None:
    example = encode_script(
        script(row(instruction="Count.", input="a cat", output="One cat."), tokenizer), tokenizer
    )
    assert read(example, tokenizer) == (
        "<s>### Instruction:\nCount.\n\n### Input:\na cat\n\n### Response:\n"
    )
    assert learned(example, tokenizer) == "One cat.</s>"
    assert example.learned == int((example.labels != IGNORED).sum())


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}])
def test_an_instruction_without_input(tokenizer: Any, empty: dict[str, Any]) -> None:
    example = encode_script(
        script(row(instruction="Count.", output="One.", **empty), tokenizer), tokenizer
    )
    assert read(example, tokenizer) == "<s>### Instruction:\nCount.\n\n### Response:\n"


def test_prompt_and_completion_are_taken_as_they_are(tokenizer: Any) -> None:
    example = encode_script(
        script(row(prompt="Once upon", completion=" a time"), tokenizer), tokenizer
    )
    assert read(example, tokenizer) == "<s>Once upon"
    assert learned(example, tokenizer) == " a time</s>"


def test_text_is_learned_whole(tokenizer: Any) -> None:
    example = encode_script(script(row(text="Once upon a time"), tokenizer), tokenizer)
    assert torch.equal(example.ids, example.labels)
    assert tokenizer.decode(example.ids) == "<s>Once upon a time</s>"


def test_the_prompts_tokens_are_those_of_the_prompt_alone(tokenizer: Any) -> None:
    """Also where joining prompt and answer would give another token across the border."""
    whole = tokenizer("the cat sat")["input_ids"]
    prompt, answer = "the ca", "t sat"
    alone = tokenizer(prompt)["input_ids"]
    assert whole[: len(alone)] != alone  # the tokenizer does join them
    example = encode_script(script(row(prompt=prompt, completion=answer), tokenizer), tokenizer)
    assert example.ids[: len(alone)].tolist() == alone
    assert learned(example, tokenizer) == f"{answer}</s>"


def test_a_conversation_without_a_template(tokenizer: Any) -> None:
    chat = messages(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"),
                    ("user", "Bye"), ("assistant", "Good bye"))  # fmt: skip
    example = encode_script(script(row(messages=chat), tokenizer), tokenizer)
    assert tokenizer.decode(example.ids) == (
        "<s>### System:\nBe kind.\n\n### User:\nHi\n\n### Assistant:\nHello</s>"
        "### User:\nBye\n\n### Assistant:\nGood bye</s>"
    )
    assert learned(example, tokenizer) == "Hello</s>Good bye</s>"


def test_a_conversation_with_the_tokenizers_template(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    chat = messages(("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye."))
    example = encode_script(script(row(messages=chat), tokenizer), tokenizer)
    text = "<s>[user]Hi|[assistant]Hello</s>[user]Bye|[assistant]Bye.</s>"
    assert tokenizer.decode(example.ids) == text
    assert learned(example, tokenizer) == "Hello</s>Bye.</s>"
    assert example.ids[0] == tokenizer.bos_token_id
    assert int((example.ids == tokenizer.bos_token_id).sum()) == 1


def test_what_follows_the_last_answer_is_left_out(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    chat = messages(("user", "Hi"), ("assistant", "Hello"), ("user", "And?"))
    example = encode_script(script(row(messages=chat), tokenizer), tokenizer)
    assert tokenizer.decode(example.ids) == "<s>[user]Hi|[assistant]Hello</s>"


def test_a_template_that_changes_earlier_turns_is_learned_at_its_last_answer(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] if loop.last or m['role'] == "
        "'user' else '...' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = messages(("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye."))
    example = encode_script(script(row(messages=chat), tokenizer), tokenizer)
    assert tokenizer.decode(example.ids) == "[user]Hi[assistant]...[user]Bye[assistant]Bye."
    assert learned(example, tokenizer) == "Bye."


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "a \ud83d b"},
        {"prompt": "a", "completion": "\udc00"},
        {"messages": [{"role": "assistant", "content": "x\ud800"}]},
    ],
)
def test_half_a_surrogate_pair_is_no_text(tokenizer: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(IrqError, match=r"half of a pair, which is no character") as caught:
        script(row(**fields), tokenizer)
    str(caught.value).encode()


def test_a_template_that_refuses(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(IrqError, match=r"row 7: the chat template does not take it: .*alternate"):
        script(row(messages=messages(("assistant", "x"))), tokenizer)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"question": "a", "answer": "b"}, "has the fields 'question', 'answer'; needed are inst"),
        ({}, "has the fields none; needed are"),
        ({"instruction": "a"}, "has the fields 'instruction'; needed"),
        ({"instruction": "a", "output": 3}, "'output' is of type int, a string"),
        ({"prompt": None, "completion": "b"}, "'prompt' is null, a string"),
        ({"text": ["a"]}, "'text' is of type list"),
        ({"messages": []}, "'messages' is of type list, a list of messages"),
        ({"messages": "hi"}, "'messages' is of type str"),
        ({"messages": [{"role": "user"}]}, "message 1 has no 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message has the role 'assistant'"),
    ],
)
def test_rows_without_the_fields(tokenizer: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(IrqError, match=says) as caught:
        script(row(**fields), tokenizer)
    assert str(caught.value).startswith("data.json: row 7")


words = st.text(st.sampled_from("abc \n#é本"), max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(prompt=words, answer=words)
def test_nothing_is_lost_and_the_border_is_where_it_was(
    tokenizer: Any, prompt: str, answer: str
) -> None:
    example = encode_script(script(row(prompt=prompt, completion=answer), tokenizer), tokenizer)
    assert read(example, tokenizer) == f"<s>{prompt}"
    assert learned(example, tokenizer) == f"{answer}</s>"


def test_batches_are_padded_on_the_right() -> None:
    short = Example(torch.tensor([5, 6]), torch.tensor([IGNORED, 6]))
    long = Example(torch.tensor([7, 8, 9]), torch.tensor([7, 8, 9]))
    batch = Collator(1)([short, long])
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED], [7, 8, 9]]
    assert long.learned == 2  # the first token of an example is never predicted


def test_padding_needs_no_padding_token(tokenizer: Any) -> None:
    tokenizer.pad_token = None
    assert padding_id(tokenizer, 1024) == tokenizer.eos_token_id
    assert padding_id(object(), 1024) == 0


def test_a_padding_token_that_was_added_to_the_tokenizer_alone(tokenizer: Any) -> None:
    """The embedding has no row for it."""
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    rows = tokenizer.pad_token_id
    assert padding_id(tokenizer, rows + 1) == rows
    assert padding_id(tokenizer, rows) == tokenizer.eos_token_id
    assert padding_id(tokenizer, 1) == 0


@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_that_ends_the_text_is_only_read(tokenizer: Any, bos: bool) -> None:
    """Also where the tokenizer puts such a token at the end of every text."""
    if bos:
        ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=ends
        )
    found = encode_script(script(row(prompt="Hi</s>", completion="Hello"), tokenizer), tokenizer)
    assert read(found, tokenizer) == "<s>Hi</s>"
    assert learned(found, tokenizer) == "Hello</s>"
