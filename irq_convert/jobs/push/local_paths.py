"""What small files say of the machine they were written on, and the same without it.

PEFT and transformers write down where the base model lay: in adapter_config.json, in the state of
a training run, in the model card and its tags. Elsewhere a path leads nowhere, the Hub refuses it
as a `base_model`, and it tells a stranger about its owner's folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

FILES = ("adapter_config.json", "config.json", "trainer_state.json", "tokenizer_config.json")
"""Files that may hold a path under one of `KEYS`."""
KEYS = frozenset(
    ("base_model_name_or_path", "_name_or_path", "name_or_path", "best_model_checkpoint")
)
_TAG = re.compile(r"base_model:(?:\w+:)?(?P<name>.+)")


def is_local(name: object) -> bool:
    """Whether the name of a model is a path of this machine and no Hub id."""
    if not isinstance(name, str) or not name:
        return False
    rooted = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    relative = name.startswith((".", "~")) or "\\" in name or name.count("/") > 1
    return rooted or relative or Path(name).exists()


def last_part(path: str) -> str:
    """The name of the folder that a path leads to."""
    return PureWindowsPath(path).name or "model"


def without_paths(content: bytes) -> tuple[bytes, list[str]]:
    """A JSON file with the paths under `KEYS` cut to their last part, and the paths found.

    A file without any, or that is no JSON object, comes back as it is.
    """
    try:
        read = json.loads(content)
    except ValueError:
        return content, []
    found: list[str] = []
    cut = _cut(read, found)
    return (json.dumps(cut, indent=2, sort_keys=True).encode() if found else content), found


def _cut(value: Any, found: list[str]) -> Any:
    if isinstance(value, list):
        return [_cut(item, found) for item in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, item in value.items():
        if key in KEYS and is_local(item):
            found.append(item)
            item = last_part(item)
        result[key] = _cut(item, found)
    return result


def clean_metadata(card: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A card's metadata without local base models and tags that name them, and the paths found."""
    found: list[str] = []
    kept = dict(card)
    named = kept.get("base_model")
    bases = named if isinstance(named, list) else [named]
    local = [str(base) for base in bases if is_local(base)]
    if local:
        found += local
        left = [base for base in bases if base not in local]
        kept.pop("base_model")
        if left:
            kept["base_model"] = left
        else:
            kept.pop("base_model_relation", None)
    tags = kept.get("tags")
    if isinstance(tags, list):
        named_by = {tag: match["name"] for tag in tags if (match := _TAG.fullmatch(str(tag)))}
        gone = {tag for tag, name in named_by.items() if is_local(name)}
        found += [named_by[tag] for tag in gone]
        if gone:
            kept["tags"] = [tag for tag in tags if tag not in gone]
    return kept, sorted(set(found))


def clean_text(text: str, paths: list[str]) -> str:
    """`text` with each of `paths` cut to its last part, longer ones first."""
    for path in sorted(set(paths), key=len, reverse=True):
        if is_local(path) and ("/" in path or "\\" in path):
            text = text.replace(path, last_part(path))
    return text
