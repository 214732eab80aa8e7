"""Updating a card: the user's text and metadata survive, whatever they are."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from irq_convert.cli.main import app
from irq_convert.errors import IrqError
from irq_convert.jobs.push.card import BEGIN, END, make_card
from irq_convert.jobs.push.card_metadata import (
    inherited_metadata,
    merge_metadata,
    split_card,
    yaml_block,
)
from irq_convert.jobs.push.card_table import table
from irq_convert.jobs.push.command_again import command_again
from irq_convert.jobs.push.pushed_folder import FolderKind, PushedFolder, open_pushed_folder

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x85\u2028\u2029"), max_size=60)
NAMES = st.text(st.characters(categories=["L", "N", "P"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def subject(made: Path) -> PushedFolder:
    return open_pushed_folder(made)


def card(subject: PushedFolder, existing: str | None, source: str | None = None) -> str:
    sums = dict.fromkeys(subject.files, "0" * 64)
    return make_card(
        subject, "org/x", sums, base_model="org/base", source_card=source, existing=existing
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(before=WORDS, after=WORDS)
@example(before="---\n", after="---")
def test_text_around_our_part_survives_and_the_update_is_stable(
    subject: PushedFolder, before: str, after: str
) -> None:
    top = "---\nlicense: mit\n---\n"
    first = card(subject, f"{top}{before}{BEGIN}old{END}{after}")
    _, _, body = split_card(first, "")
    assert body.startswith(before + BEGIN)
    assert body.endswith(END + after)
    assert card(subject, first) == first
    appended = card(subject, top + before)
    assert split_card(appended, "")[2].startswith(before.rstrip("\r\n"))
    assert card(subject, appended) == appended


@settings(max_examples=60)
@given(data=st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), VALUES, max_size=5))
def test_metadata_of_the_user_survives(data: dict[str, Any]) -> None:
    data = {key: value for key, value in data.items() if value is not None}
    mine = {"base_model": "org/b", "library_name": "l", "tags": ["a", "b"]}
    new = merge_metadata(data, mine, {"license": "mit"})
    kept = {key: value for key, value in data.items() if key not in mine}
    assert {key: new[key] for key in kept} == kept
    assert new["license"] == data.get("license", "mit")
    assert merge_metadata(new, mine, {"license": "mit"}) == new
    assert split_card(yaml_block(new, "\n"), "")[1] == new


def test_line_ends_of_windows_stay(subject: PushedFolder) -> None:
    text = card(subject, "---\r\nlicense: mit\r\n---\r\nHello.\r\n")
    assert "\n" not in text.replace("\r\n", "")
    assert card(subject, text) == text


def test_a_block_that_needs_no_change_is_left_as_it_was_written(subject: PushedFolder) -> None:
    first = card(subject, None)
    commented = first.replace("---\n", "---\n# why\n", 1)
    assert card(subject, commented) == commented


def test_what_is_inherited() -> None:
    source = "---\nlicense: llama3\nlanguage: no\ntags: [x]\ndatasets: [d]\n---\n# T\n"
    assert inherited_metadata(source) == {"license": "llama3", "language": ["no"]}
    assert inherited_metadata("# no metadata") == {}
    assert inherited_metadata("---\n[\n---\n") == {}
    assert inherited_metadata(None) == {}
    theirs = {"license": "mit"}
    both = merge_metadata(theirs, {}, {"license": "other", "license_link": "x", "language": ["en"]})
    assert both == {"license": "mit", "language": ["en"]}


def test_a_byte_order_mark_hides_no_licence() -> None:
    text = "\ufeff---\nlicense: mit\nlanguage: en\n---\n# Model\n"
    assert inherited_metadata(text) == {"license": "mit", "language": ["en"]}


@pytest.mark.parametrize("text", [BEGIN, END, END + BEGIN, BEGIN + END + BEGIN + END])
def test_marks_that_are_no_pair(subject: PushedFolder, text: str) -> None:
    with pytest.raises(IrqError, match="not one pair"):
        card(subject, text)


def test_a_base_model_in_a_list_of_the_user_stays(subject: PushedFolder) -> None:
    text = card(subject, "---\nbase_model: [org/base, org/other]\n---\n")
    assert split_card(text, "")[1]["base_model"] == ["org/base", "org/other"]


def test_the_command_is_one_that_the_program_takes(subject: PushedFolder) -> None:
    options = dict(subject.note["options"]) | {"keep": ["a|b", "c d"], "include_towers": True}
    options["include_embeddings"] = True
    note = dict(subject.note) | {"options": options}
    made = PushedFolder(subject.folder, FolderKind.ARTIFACT, subject.files, note, {})
    words = shlex.split(command_again(made))
    assert words[:3] == ["irq-convert", "quantize", "org/base"]
    assert words[words.index("--keep") + 1] == "a|b"
    assert "--include-towers" in words
    assert "--include-embeddings" in words
    assert "False" not in words
    # The names are options: what is refused is the bad number of bits, put in last.
    result = CliRunner().invoke(app, [*words[1:], "--bits", "9"])
    assert "No such option" not in result.output
    assert isinstance(result.exception, IrqError)
    assert "--bits 9" in str(result.exception)


def test_bars_do_not_break_tables() -> None:
    assert table(("a", "b"), [("x|y", "z")]).splitlines()[2] == "| x\\|y | z |"
