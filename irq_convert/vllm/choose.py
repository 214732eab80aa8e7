"""Which method computes a layer of vLLM. Imports vLLM, when a model is built."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from irq_convert.vllm.experts import experts_method
from irq_convert.vllm.linear import IrqLinearMethod
from irq_convert.vllm.tables import IrqTableMethod


def choose(config: Any, layer: Any, prefix: str) -> Any:
    """The method for `layer`, called `prefix`; None where vLLM's own for dense weights serves.

    `config` is an `IrqVllmConfig`. Raises `IrqError`, naming the module, for what is not served.
    """
    modules = config.modules
    if isinstance(layer, LinearBase):
        names = modules.matrices(prefix, config.packed_modules_mapping)
        formats = tuple(modules.format_of(name) for name in names)
        if all(fmt is None for fmt in formats):
            return UnquantizedLinearMethod()
        return IrqLinearMethod(names, formats)
    if isinstance(layer, VocabParallelEmbedding):
        table = modules.table(prefix, isinstance(layer, ParallelLMHead))
        return None if table is None else IrqTableMethod(*table)
    if isinstance(layer, RoutedExperts):
        return experts_method(modules, layer, prefix)
    return None
