"""The model card of a result: written anew, or our part of an existing one renewed."""

from __future__ import annotations

from collections.abc import Mapping

from irq_convert.errors import IrqError
from irq_convert.jobs.push.card_body import card_body
from irq_convert.jobs.push.card_metadata import (
    inherited_metadata,
    merge_metadata,
    own_metadata,
    split_card,
    yaml_block,
)
from irq_convert.jobs.push.local_paths import clean_metadata, clean_text
from irq_convert.jobs.push.pushed_folder import PushedFolder

BEGIN = "<!-- irq-convert begins: each push writes this part anew -->"
END = "<!-- irq-convert ends -->"


def is_ours(card: str | None) -> bool:
    """Whether a card has a part that this program wrote."""
    return card is not None and BEGIN in card


def make_card(
    subject: PushedFolder,
    repo_id: str,
    sums: Mapping[str, str],
    *,
    base_model: str | None,
    source_card: str | None,
    existing: str | None,
    revision: str | None = None,
) -> str:
    """The text of README.md for `repo_id`; `revision` is its branch where that is not the main one.

    `source_card` is that of the base model, of which licence, languages and task are inherited.
    Of an `existing` card everything stays but our part, between its two marks (which is put at the
    end of a card that has none), and the metadata that says what the repository holds. The same
    arguments give the same bytes. Raises `IrqError` when `existing` cannot be updated safely.
    """
    part = f"{BEGIN}\n{card_body(subject, repo_id, base_model, sums, revision)}\n{END}"
    mine = own_metadata(subject, base_model)
    source = inherited_metadata(source_card)
    if existing is None or not existing.strip():
        return yaml_block(merge_metadata({}, mine, source), "\n") + "\n" + part + "\n"
    newline = "\r\n" if "\r\n" in existing else "\n"
    block, old, text = split_card(existing, f"{repo_id}: README.md")
    kept, paths = clean_metadata(old)
    text = clean_text(text, [*paths, *subject.paths])
    new = merge_metadata(kept, mine, source)
    top = block if new == old else yaml_block(new, newline)
    return top + _renewed(text, part.replace("\n", newline), newline, repo_id)


def _renewed(text: str, part: str, newline: str, repo_id: str) -> str:
    """The body with our part in its place."""
    begins, ends = text.count(BEGIN), text.count(END)
    if not begins and not ends:
        before = text.rstrip("\r\n")
        return f"{before}{newline * 2}{part}{newline}" if before else f"{newline}{part}{newline}"
    first, last = text.find(BEGIN), text.find(END)
    if begins != 1 or ends != 1 or last < first:
        raise IrqError(
            f"{repo_id}: README.md: the marks of irq-convert's part ({BEGIN} and {END}) are not "
            "one pair any more: remove what is left of them, or restore both"
        )
    return text[:first] + part + text[last + len(END) :]
