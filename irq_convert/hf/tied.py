"""Tied weights: tensors that a model has under several names, and one of which a file may lack."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from irq_convert.artifact.config import PART_SUFFIXES, module_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORDS = ("embed", "lm_head", "wte")


def tied_keys(model: PreTrainedModel) -> set[str]:
    """State-dict keys of tensors that share memory with another one."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied.keys(), *tied.values()}


def tied_groups(model: PreTrainedModel) -> tuple[frozenset[str], ...]:
    """The same keys, those together that share one tensor."""
    groups: list[set[str]] = []
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        touched = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in touched]
        groups.append({*pair, *(key for group in touched for key in group)})
    return tuple(frozenset(group) for group in groups)


def tie_parts(model: PreTrainedModel, modules: Collection[str]) -> None:
    """Let transformers tie every part of packed weights that `modules` share, as it does `weight`.

    It goes by this list when it has loaded a model; when it saves, by the names alone.
    """
    tied = model.all_tied_weights_keys
    for key, source in list(tied.items()):
        if module_name(key) in modules and module_name(source) in modules:
            tied |= {key + suffix: source + suffix for suffix in PART_SUFFIXES}


def untie_parts(model: PreTrainedModel) -> None:
    """The list as it was, for a model whose weights are dense again."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for key in [key for key in tied if key.endswith(PART_SUFFIXES)]:
        del tied[key]


def tied_by_name(config: Mapping[str, Any] | None, tensors: Iterable[str]) -> set[str]:
    """Those of `tensors` that are probably tied, where no class is known that could say so."""
    if (config or {}).get("tie_word_embeddings") is not True:
        return set()
    return {name for name in tensors if any(word in name for word in _WORDS)}
