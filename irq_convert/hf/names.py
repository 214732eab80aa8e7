"""Names of tensors in the files and in the model, in both directions.

transformers renames while it loads (a base model drops its prefix, old checkpoints get new module
names) and renames back while it saves. An artifact's configuration speaks of names in the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)

from irq_convert.hf.conversions import Adjusted, PartRenaming, adjust

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Place:
    """Where transformers loads a tensor of the files: the state-dict `key`, found or not.

    Where it is merged with others or rearranged, `converter` does that, by its `pattern`;
    `renamed` is then the name it would have in the model if it were only renamed.
    """

    tensor: str
    key: str
    renamed: str
    converter: WeightConverter | None = None
    pattern: str = ""


def places(
    model: PreTrainedModel, tensors: Iterable[str], adjusted: Adjusted | None = None
) -> Iterator[Place]:
    """The place of each of `tensors`, in stock transformers or `adjusted` to packed ones."""
    transforms = adjust(get_model_conversion_mapping(model), adjusted)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    for tensor in tensors:
        key, pattern = rename_source_key(tensor, renamings, converters, prefix, state)
        if key not in state and tensor in state:
            key, pattern = rename_source_key(tensor, [], [], prefix, state)
        if pattern is None:
            yield Place(tensor, key, key)
            continue
        before, _ = rename_source_key(tensor, renamings, converters)
        renamed = apply_renamings(tensor, renamings)
        if key == f"{prefix}.{before}":
            renamed = f"{prefix}.{renamed}"
        elif before == f"{prefix}.{key}":
            renamed = renamed.removeprefix(f"{prefix}.")
        yield Place(tensor, key, renamed, by_pattern[pattern], pattern)


def keys_in_model(
    model: PreTrainedModel, tensors: Iterable[str], adjusted: Adjusted | None = None
) -> dict[str, str]:
    """The state-dict key that each tensor of the files would be loaded to, found or not.

    Tensors that transformers would merge into another (experts of a mixture) are left out.
    """
    return {p.tensor: p.key for p in places(model, tensors, adjusted) if p.converter is None}


def tensors_in_files(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """The name that each state-dict key will have in the files when `model` is saved."""
    loaded = getattr(model, "_weight_conversions", None) or []
    reversed_transforms = [t.reverse_transform() for t in loaded[::-1]]
    renamings = [t for t in reversed_transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in reversed_transforms if isinstance(t, WeightConverter)]
    return {key: rename_source_key(key, renamings, converters, reverse=True)[0] for key in keys}


def finish_parts(model: PreTrainedModel, keys: Iterable[tuple[str, str]]) -> None:
    """Let `model`, just loaded, save its parts under the names they came by.

    `keys` are pairs of a packed parameter and one of its parts, by their names in the model.
    """
    loaded = getattr(model, "_weight_conversions", None) or []
    found = [t for t in loaded if isinstance(t, PartRenaming)]
    if not found:
        return
    pairs = list(keys)
    files = tensors_in_files(model, {key for pair in pairs for key in pair})
    back = {}
    for key, part in pairs:
        wanted = files[key] + part.removeprefix(key)
        if files[part] != wanted:
            back[files[part]] = wanted
    found[0].back = back
