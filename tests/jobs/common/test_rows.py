"""Data files of rows, and every way they are not one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.rows import holds_rows, read_rows

fields = st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers(), max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(rows=st.lists(fields, min_size=1, max_size=5), ascii_only=st.booleans())
def test_an_array_and_lines_are_the_same_rows(
    tmp_path: Path, rows: list[dict[str, object]], ascii_only: bool
) -> None:
    array, lines = tmp_path / "a.json", tmp_path / "b.jsonl"
    array.write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=1), encoding="utf-8")
    text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    lines.write_text(f"\n{text}\n\n", encoding="utf-8")
    for path in (array, lines):
        assert [row.fields for row in read_rows(path)] == rows


def test_where_a_row_came_from(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.where for row in read_rows(path)] == [f"{path}: line 1", f"{path}: line 3"]
    path.write_text('[{"text": "a"}, {"text": "b"}]')
    assert [row.where for row in read_rows(path)] == [f"{path}: row 1", f"{path}: row 2"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b" \n\t\n", "empty but for white space"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at offset 10"),
        (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        (b'[{"text": "a"},\n{"text"}]', "not JSON: line 2, column 8"),
        (b"[]", "an empty array"),
        (b'{"text": "a"}\n[1]\n', "line 2: an array, not an object"),
        (b'[{"text": "a"}, "b"]', "row 2: a string, not an object"),
        (b"[1, 2]", "row 1: a number, not an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1 is not a row: Exceeds the limit"),
        (b"[" + b"9" * 5000 + b"]", "not rows: Exceeds the limit"),
    ],
)
def test_files_that_hold_no_rows(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(IrqError, match=says) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such text file"):
        read_rows(tmp_path / "none.json")


def test_names_say_what_a_file_holds() -> None:
    assert all(holds_rows(Path(name)) for name in ("a.json", "a.JSONL", "a.ndjson"))
    assert not any(holds_rows(Path(name)) for name in ("a.txt", "a", "json", "a.json.txt"))
