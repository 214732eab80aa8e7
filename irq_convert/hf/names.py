"""Names of tensors in the files and in the model, in both directions.

transformers renames while it loads (a base model drops its prefix, old checkpoints get new module
names) and renames back while it saves. An artifact's configuration speaks of names in the files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def keys_in_model(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """The state-dict key that each tensor of the files would be loaded to, found or not.

    Tensors that transformers would merge into another (experts of a mixture) are left out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix
    keys = {}
    for tensor in tensors:
        key, merged = rename_source_key(tensor, renamings, converters, prefix, state)
        if key not in state and tensor in state:
            key, merged = rename_source_key(tensor, [], [], prefix, state)
        if merged is None:
            keys[tensor] = key
    return keys


def names_in_files(model: PreTrainedModel, modules: Iterable[str]) -> dict[str, str]:
    """The name that each of `modules` will have in the files when `model` is saved."""
    loaded = getattr(model, "_weight_conversions", None) or []
    reversed_transforms = [t.reverse_transform() for t in loaded[::-1]]
    renamings = [t for t in reversed_transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in reversed_transforms if isinstance(t, WeightConverter)]
    names = {}
    for module in modules:
        key, _ = rename_source_key(f"{module}.weight", renamings, converters, reverse=True)
        names[module] = key.removesuffix(".weight")
    return names


def tied_keys(model: PreTrainedModel) -> set[str]:
    """State-dict keys of tensors that share memory with another one."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied.keys(), *tied.values()}
