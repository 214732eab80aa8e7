"""Tied weights: tensors that a model has under several names, and one of which a file may lack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

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


def tied_by_name(config: Mapping[str, Any] | None, tensors: Iterable[str]) -> set[str]:
    """Those of `tensors` that are probably tied, where no class is known that could say so."""
    if (config or {}).get("tie_word_embeddings") is not True:
        return set()
    return {name for name in tensors if any(word in name for word in _WORDS)}
