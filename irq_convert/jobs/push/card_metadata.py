"""The YAML at the top of a model card: what is set, what is inherited, what is left as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard
from huggingface_hub.repocard_data import CardData

from irq_convert.artifact.export_targets import TARGETS
from irq_convert.errors import IrqError
from irq_convert.jobs.push.pushed_folder import FolderKind, PushedFolder

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def split_card(text: str, where: str) -> tuple[str, dict[str, Any], str]:
    """Cut a card into its YAML block (with the lines around it), its metadata and its body.

    Raises `IrqError` when the block is not YAML or no mapping of names; `where` names the card.
    """
    text = text.removeprefix("\ufeff")  # some editors begin a file with it; YAML begins with ---
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return "", {}, text
    try:
        found = dict(RepoCard(text).data.__dict__)
    except Exception as error:  # PyYAML's many, and those of values that are no mapping
        detail = " ".join(str(error).split())[:100]
        raise IrqError(f"{where}: its metadata cannot be read ({detail}): correct it") from None
    return match[0], found, text[match.end() :]


def inherited_metadata(source_card: str | None) -> dict[str, Any]:
    """What a card takes from the card of the source; nothing from one that cannot be read."""
    if source_card is None:
        return {}
    try:
        found = split_card(source_card, "the source's card")[1]
    except IrqError:
        return {}
    kept = {key: found[key] for key in INHERITED if found.get(key) not in (None, "", [])}
    if "language" in kept:  # YAML takes Norwegian's code for a boolean
        languages = kept["language"] if isinstance(kept["language"], list) else [kept["language"]]
        kept["language"] = ["no" if code is False else code for code in languages]
    return kept


def own_metadata(subject: PushedFolder, base_model: str | None) -> dict[str, Any]:
    """What this program knows better than anyone who wrote a card by hand."""
    known = {"base_model": base_model, "base_model_relation": subject.relation}
    return (known if base_model else {}) | {
        "library_name": _library(subject),
        "tags": ["irq-convert", *_tags(subject)],
    }


def _library(subject: PushedFolder) -> str:
    if subject.kind == FolderKind.ADAPTER:
        return "peft"
    target = TARGETS.get(subject.target or "")
    return "transformers" if target is None else target.library


def _tags(subject: PushedFolder) -> list[str]:
    if subject.kind == FolderKind.ADAPTER:
        return ["lora", "iec-lora"] if subject.adapter_kind.connected else ["lora"]
    if subject.kind == FolderKind.DENSE:
        return []
    if subject.target is not None:
        return list(TARGETS[subject.target].tags) if subject.target in TARGETS else []
    return ["irq", "icq", *(f"{number}-bit" for number in subject.widths), *subject.codebooks]


def merge_metadata(
    old: Mapping[str, Any], mine: Mapping[str, Any], source: Mapping[str, Any]
) -> dict[str, Any]:
    """The metadata of an updated card: `old`, with `mine` set and `source` where `old` is silent.

    Tags are added to, and a list of base models that names ours is left alone.
    """
    new = dict(old)
    for key, value in mine.items():
        if key == "tags":
            tags = new.get("tags")
            before = tags if isinstance(tags, list) else [tags] if tags else []
            new["tags"] = [*before, *(tag for tag in value if tag not in before)]
        elif key == "base_model" and value in _listed(new.get("base_model")):
            continue
        else:
            new[key] = value
    if "license" not in new:
        new |= {key: value for key, value in source.items() if key not in new}
    else:  # name and link belong to the licence that the source has
        rest = {key: value for key, value in source.items() if not key.startswith("license")}
        new |= {key: value for key, value in rest.items() if key not in new}
    return new


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def yaml_block(metadata: Mapping[str, Any], newline: str) -> str:
    """Metadata as the block at the top of a card."""
    text = CardData(**metadata).to_yaml(line_break=newline)
    return f"---{newline}{text}{newline}---{newline}"
