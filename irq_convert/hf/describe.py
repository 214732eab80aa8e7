"""The configuration that describes a model as it is about to be saved.

Layers may have changed since loading: some dequantized or merged, a base model taken out of its
head. What is written must name exactly what lies in the files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from irq_convert.artifact.config import ModuleFormat, QuantizationConfig
from irq_convert.hf.names import names_in_files, tied_keys
from irq_convert.nn.linear import IrqLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def describe(model: PreTrainedModel, config: QuantizationConfig) -> QuantizationConfig:
    """`config` itself while it is true of `model`, else one that is."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = names_in_files(model, linears)
    tied = tied_keys(model)
    packed: dict[str, ModuleFormat] = {}
    dense: list[str] = []
    for name, module in linears.items():
        if isinstance(module, IrqLinear):
            packed[names[name]] = module.fmt
        elif f"{name}.weight" not in tied:
            dense.append(names[name])
    kept = tuple(n for n in config.modules_to_not_convert if n not in packed)
    left_dense = (*kept, *(name for name in dense if name not in kept))
    true = all(config.module(name) == fmt for name, fmt in packed.items())
    if true and left_dense == config.modules_to_not_convert:
        return config
    overrides = {name: fmt for name, fmt in packed.items() if fmt != config.default}
    return replace(config, modules_to_not_convert=left_dense, overrides=overrides)
