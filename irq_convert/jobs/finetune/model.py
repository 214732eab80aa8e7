"""The model of a run: the artifact loaded, an adapter of the kind asked for attached."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from irq_convert.adapters.kinds import adapter_config
from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.artifact.config import QuantizationConfig
from irq_convert.checkpoint.state_dict import HEADS
from irq_convert.errors import IrqError, UsageError, one_line
from irq_convert.hf.empty_model import NoModel, empty_causal_lm
from irq_convert.hf.loading import load
from irq_convert.jobs.finetune.recipe import Recipe
from irq_convert.nn.linear import IrqLinear


def recipe_config(recipe: Recipe, block_size: int | None = None) -> Any:
    """PEFT's configuration of the adapter; `block_size` as `adapter_config` has it."""
    return adapter_config(
        AdapterKind(recipe.lora),
        connection=recipe.connection,
        block_size=block_size,
        statistics=recipe.statistics,
        r=recipe.rank,
        lora_alpha=int(recipe.alpha) if recipe.alpha.is_integer() else recipe.alpha,
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        target_modules=list(recipe.target_modules) if recipe.target_modules else "all-linear",
        task_type="CAUSAL_LM",
    )


def load_base(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """The artifact's model on `device`; `IrqError` when it does not fit there."""
    try:
        return load(folder, dtype=dtype, device_map={"": device})
    except torch.OutOfMemoryError as error:
        raise IrqError(f"{folder}: does not fit in the memory of {device}") from error


def attach_adapter(model: Any, recipe: Recipe) -> Any:
    """Freeze `model` and put a fresh adapter on it, with float32 parameters.

    Raises `UsageError` where a target module is not in the model, or the adapter does not fit one.
    """
    from irq_convert.adapters.attach import attach
    from irq_convert.adapters.targets import packed_modules

    check_targets(recipe.target_modules, (name for name, _ in model.named_modules()))
    if not recipe.rank:
        _check_packed(recipe.target_modules, packed_modules(model))
    sizes = {m.fmt.block_size for m in model.modules() if isinstance(m, IrqLinear)}
    config = recipe_config(recipe, sizes.pop() if len(sizes) == 1 else None)
    try:
        return attach(model, config, gradient_checkpointing=recipe.gradient_checkpointing)
    except ValueError as error:
        raise UsageError(f"the adapter cannot be attached: {one_line(error)}") from error


def _check_packed(targets: Iterable[str] | None, packed: Iterable[str]) -> None:
    names = list(packed)
    for target in targets or ():
        if not any(_targeted(name, (target,)) for name in names):
            raise UsageError(
                f"--target-modules {target}: is not packed, and --lora statistics trains scale and "
                "tau of packed layers: leave it out"
            )


def check_targets(targets: Iterable[str] | None, modules: Iterable[str]) -> None:
    """Raise `UsageError` unless each of `targets` is, or ends, the name of a module."""
    if targets is None:
        return
    names = list(modules)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            if target.rpartition(".")[2] in HEADS:
                raise UsageError(
                    f"--target-modules {target}: the output head is not adapted "
                    "here: leave it out, or train it with a script of your own (docs/finetune.md)"
                )
            last = sorted({name.rpartition(".")[2] for name in names if name} - set("0123456789"))
            some = [name for name in last if name.endswith(("proj", "fc1", "fc2", "dense"))]
            raise UsageError(
                f"--target-modules: no module is called {target!r}; the model has, among others, "
                f"{', '.join((some or last)[:8])}"
            )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_trainable(model: nn.Module) -> int:
    """Numbers in the trained parameters."""
    return sum(p.numel() for p in trainable(model).values())


def modules_on_meta(config: Any) -> dict[str, nn.Module]:
    """The modules of the dense model that `config` describes, without memory, by name.

    The head is left out. Raises `IrqError` when transformers cannot build the model.
    """
    try:
        model: Any = empty_causal_lm(config)
    except NoModel as error:
        raise IrqError(f"config.json: no model can be built: {error}") from error
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if module is not head}


def linears_on_meta(config: Any) -> dict[str, nn.Linear]:
    """The linear layers among `modules_on_meta`."""
    modules = modules_on_meta(config)
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}


def predict_trainable(
    recipe: Recipe,
    linears: dict[str, nn.Linear],
    quantization: QuantizationConfig,
    expert_blocks: int = 0,
) -> int:
    """Numbers that the adapter will train, from the shapes alone.

    `expert_blocks` are those of packed experts that are trained, which `linears` does not have.
    """
    moved = 2 if recipe.statistics == "both" else 1
    total = expert_blocks * moved
    for name, module in linears.items():
        if not _targeted(name, recipe.target_modules):
            continue
        inputs = module.in_features
        blocks = -(-inputs // quantization.module(name).block_size)
        if AdapterKind(recipe.lora).pooled:
            inputs = blocks
        total += recipe.rank * (inputs + module.out_features)
        if recipe.statistics is not None and name not in quantization.dense_modules:
            total += blocks * module.out_features * moved
        total += 2 if recipe.connection not in (None, "none") else 0
    return total


def _targeted(name: str, targets: tuple[str, ...] | None) -> bool:
    return targets is None or any(name == t or name.endswith(f".{t}") for t in targets)
