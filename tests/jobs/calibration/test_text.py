"""Texts into windows: what is read, how it is cut, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.calibration.text import choose_windows, tokenize_source
from tests.jobs.calibration.words import write_word_tokenizer

SIZE = 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("words")
    write_word_tokenizer(folder, SIZE, unknown=True)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _tokens(path: Path, tokenizer: Any, **changes: int) -> list[int]:
    options = CalibrationOptions(str(path), **({"tokens": 64, "window": 4} | changes))
    ids, name = tokenize_source(options, tokenizer)
    assert name == path.name
    return ids.tolist()


@given(
    tokens=st.integers(8, 400), asked=st.integers(8, 400), width=st.integers(2, 4),
    held=st.integers(2, 9), seed=st.integers(0, 3),
)  # fmt: skip
def test_windows_are_pieces_of_the_text_and_each_is_used_once(
    tokens: int, asked: int, width: int, held: int, seed: int
) -> None:
    options = CalibrationOptions("t", tokens=asked, window=width, held_out=held, seed=seed)
    found = choose_windows(torch.arange(tokens), options, "t")
    starts = found.ids[:, 0].tolist()
    assert len(set(starts)) == len(starts) == min(tokens // width, asked // width)
    assert all(start % width == 0 for start in starts)
    assert torch.equal(found.ids, found.ids[:, :1] + torch.arange(width))
    assert found.held_out == max(1, len(starts) // held)
    first = starts[: found.calibrating]
    assert first == sorted(first)


def test_the_seed_chooses_and_the_hash_tells() -> None:
    options = [CalibrationOptions("t", tokens=40, window=4, seed=seed) for seed in (0, 0, 1)]
    found = [choose_windows(torch.arange(4000), each, "t") for each in options]
    assert found[0].sha256 == found[1].sha256 != found[2].sha256
    assert not torch.equal(found[0].ids, found[2].ids)


def test_plain_text_rows_and_conversations(tmp_path: Path, tokenizer: Any) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("w1 w2 w3")
    assert _tokens(plain, tokenizer) == [1, 2, 3]
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "w1 w2"}\n{"text": "w5", "more": 1}\n')
    assert _tokens(rows, tokenizer) == [1, 2, 5]
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}"
    talk = tmp_path / "b.jsonl"
    said = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    talk.write_text(json.dumps({"messages": said}) + "\n")
    assert _tokens(talk, tokenizer) == [9, 3, 9, 4]


def test_no_more_is_tokenized_than_is_needed(tmp_path: Path, tokenizer: Any) -> None:
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "w1 w2 w3 w4"}\n' * 1000)
    assert len(_tokens(rows, tokenizer, tokens=8)) == 32


@pytest.mark.parametrize(
    ("name", "text", "kind", "says"),
    [
        ("a.txt", b"", IrqError, "empty"),
        ("a.txt", b"w1 \xff", IrqError, "not UTF-8"),
        ("a.txt", b"one two three w4", IrqError, "does not know 75% of its tokens"),
        ("a.jsonl", b'{"words": "w1"}\n', IrqError, 'no field "text" or "messages"'),
        ("a.jsonl", b"w1 w2\n", IrqError, "not JSON"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, tokenizer: Any, name: str, text: bytes, kind: type[IrqError], says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text)
    with pytest.raises(kind, match=says):
        _tokens(path, tokenizer)


def test_a_text_of_one_window_is_refused() -> None:
    options = CalibrationOptions("t", tokens=8, window=4)
    with pytest.raises(UsageError, match="7 tokens, which are not two windows of 4"):
        choose_windows(torch.arange(7), options, "t")


@pytest.mark.parametrize(
    "changes", [{"window": 1}, {"tokens": 7, "window": 4}, {"held_out": 1}, {"correction": 1.5}]
)
def test_numbers_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        CalibrationOptions("t", **changes)
