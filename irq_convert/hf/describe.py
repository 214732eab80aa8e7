"""The configuration that describes a model as it is about to be saved.

Layers may have changed since loading: some dequantized or merged, a base model taken out of its
head. What is written must name exactly what lies in the files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from irq_convert.artifact.config import ModuleFormat, QuantizationConfig, module_name
from irq_convert.hf.names import tensors_in_files
from irq_convert.hf.tied import tied_keys
from irq_convert.nn.experts import IrqExperts, Stacked
from irq_convert.nn.packed import PackedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def describe(model: PreTrainedModel, config: QuantizationConfig) -> QuantizationConfig:
    """`config` itself while it is true of `model`, else one that is."""
    formats, plain = _layers(model)
    files = tensors_in_files(model, (*formats, *plain))
    packed = {module_name(files[key]): fmt for key, fmt in formats.items()}
    dense = [module_name(files[key]) for key in plain]
    kept = dict.fromkeys(n for n in config.modules_to_not_convert if n not in packed)
    left_dense = tuple(kept | dict.fromkeys(dense))
    true = all(config.module(name) == fmt for name, fmt in packed.items())
    if true and left_dense == config.modules_to_not_convert:
        return config
    overrides = {name: fmt for name, fmt in packed.items() if fmt != config.default}
    return replace(config, modules_to_not_convert=left_dense, overrides=overrides)


def _layers(model: PreTrainedModel) -> tuple[dict[str, ModuleFormat], list[str]]:
    """State-dict keys of packed weights with their formats, and those of dense linear layers.

    A weight that modules share has the one that is saved.
    """
    tied = tied_keys(model)
    second = set(getattr(model, "all_tied_weights_keys", None) or ())
    packed: dict[str, ModuleFormat] = {}
    dense: list[str] = []
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if isinstance(module, PackedWeight):
            if key not in second:
                packed[key] = module.stored_format()
        elif isinstance(module, IrqExperts):
            for parameter, layout in module.packed.items():
                if isinstance(layout, Stacked):
                    packed[f"{name}.{parameter}"] = module.stored_format(parameter)
        elif isinstance(module, nn.Linear | Conv1D) and key not in tied:
            dense.append(key)
    return packed, dense
