"""Tied weights: tensors that a model has under several names, and one of which a file may lack."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
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


def tie_parts(model: PreTrainedModel, modules: Collection[str], parts: Iterable[str]) -> None:
    """Let transformers tie all `parts` of the packed weight that `modules` share.

    It goes by this list when it has loaded a model; when it saves, by the names alone.
    """
    tied = model.all_tied_weights_keys
    parts = tuple(parts)
    for key, source in list(tied.items()):
        if module_name(key) in modules and module_name(source) in modules:
            own, other = module_name(key), module_name(source)
            tied |= {f"{own}.{part}": f"{other}.{part}" for part in parts}


def untie_stored(
    model: PreTrainedModel, stored: Mapping[str, str], packed: AbstractSet[str]
) -> None:
    """Let `model`, on meta, tie no packed weight to one that has its own tensor in the files.

    transformers would compare the codes of the two alone. `stored` has tensors by their keys in the
    model, `packed` those that are quantized.
    """
    tied = model.all_tied_weights_keys
    own = [key for key, source in tied.items() if {key, source} <= stored.keys()]
    apart = [key for key in own if {stored[key], stored[tied[key]]} & packed]
    for key in apart:
        del tied[key]
    if apart and not tied:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


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
