"""Reading, splitting, tokenizing and cutting a text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.text import (
    CHARACTERS_A_TOKEN,
    cut_windows,
    encode_stream,
    read_text,
    split_text,
)

from .conftest import make_tokenizer, story


def test_read_text_keeps_every_character(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("a\r\nb\rc\nd\u00e9 <s> \U0001f600".encode())
    assert read_text(path) == "a\r\nb\rc\nd\u00e9 <s> \U0001f600"


def test_read_text_drops_the_byte_order_mark_only_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffa\ufeffb".encode())
    assert read_text(path) == "a\ufeffb"


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (None, UsageError, "no such text file"),
        (b"", IrqError, "empty"),
        (b"\xef\xbb\xbf", IrqError, "empty"),
        (b"good \xff bad", IrqError, "not UTF-8: byte 0xff at offset 5"),
    ],
)
def test_bad_files_are_one_line(
    tmp_path: Path, content: bytes | None, kind: type[IrqError], says: str
) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IrqError, match=says) as caught:
        read_text(path)
    assert type(caught.value) is kind
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_a_long_text_only_a_part_is_tokenized() -> None:
    tokenizer, sizes = make_tokenizer(), []

    def watched(text: str, **how: Any) -> Any:
        sizes.append(len(text))
        return tokenizer(text, **how)

    text = story(3) * 100
    found = encode_stream(watched, text, 50)
    assert torch.equal(found, encode_stream(tokenizer, text)[:50])
    assert sizes == [50 * CHARACTERS_A_TOKEN]
    few = " " * 100_000 + text  # what a token stands for may be long
    assert torch.equal(encode_stream(tokenizer, few, 50), encode_stream(tokenizer, few)[:50])


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a folder, not a file"):
        read_text(tmp_path)


def test_split_moves_to_the_next_line_start() -> None:
    assert split_text("ab\ncd\nef\n", 0.0) == ("", "ab\ncd\nef\n")
    assert split_text("ab\ncd\nef\n", 0.12) == ("ab\n", "cd\nef\n")
    assert split_text("ab\ncd\nef\n", 3 / 9) == ("ab\n", "cd\nef\n")
    assert split_text("ab\ncd\nef\n", 0.5) == ("ab\ncd\n", "ef\n")
    assert split_text("ab\ncd\nef\n", 0.9) == ("ab\ncd\nef", "\n")
    assert split_text("abcdefghij", 0.9) == ("abcdefghi", "j")


@given(
    st.text(alphabet="ab\n\u00e9", min_size=1, max_size=60),
    st.floats(min_value=0, max_value=1, exclude_max=True),
)
def test_split_loses_nothing_and_leaves_something(text: str, fraction: float) -> None:
    before, after = split_text(text, fraction)
    assert before + after == text
    assert after
    assert len(before) >= int(fraction * len(text))


def test_stream_has_one_bos_at_the_start_and_can_be_cut_short() -> None:
    tokenizer = make_tokenizer()
    text = story(1)
    ids = encode_stream(tokenizer, text)
    assert ids.dtype == torch.int64
    assert ids.tolist().count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert torch.equal(encode_stream(tokenizer, text, 17), ids[:17])


@given(st.integers(2, 40), st.integers(2, 300))
def test_windows_are_the_stream_cut_up(context: int, length: int) -> None:
    ids = torch.arange(length)
    if length < context:
        with pytest.raises(UsageError, match=f"{length} tokens, less than one window of {context}"):
            cut_windows(ids, context)
        return
    windows = cut_windows(ids, context)
    joined = torch.cat(windows)
    dropped = length - len(joined)
    assert torch.equal(joined, ids[: len(joined)])
    assert dropped == (1 if length % context == 1 else 0)
    assert [len(w) for w in windows[:-1]] == [context] * (len(windows) - 1)
    assert 2 <= len(windows[-1]) <= context
