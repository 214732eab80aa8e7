"""What "all-linear" means on a model with packed experts, and what PEFT must not be asked there.

Experts are not among all linear layers: transformers has them in stacked parameters, and a layer of
hundreds of experts would get hundreds of adapters. Where they are layers of their own here, they
can be named. Stock PEFT, in turn, rewrites the targets of a `LoraConfig` for such models and would
wrap packed stacks, which is refused.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

from torch import nn

from irq_convert.adapters.experts import stacks
from irq_convert.errors import UsageError
from irq_convert.nn.experts import IrqExperts
from irq_convert.nn.linear import IrqLinear

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"


def is_all_linear(config: LoraConfig) -> bool:
    """Whether `config` targets all linear layers by PEFT's shorthand."""
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def not_linear(model: nn.Module) -> str | None:
    """An expression for what "all-linear" leaves out: layers of experts, routers, and some more.

    A router is a linear layer whose class computes something else with it. `nn.MultiheadAttention`
    reads the weight of its `out_proj` and never calls it, so an adapter would learn nothing there.
    None where there is nothing of the kind.
    """
    patterns: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, IrqExperts):
            if not any(isinstance(child, nn.Linear) for child in module.modules()):
                continue
            patterns[f"{_any_number(name)}\\..*"] = None
        elif isinstance(module, nn.MultiheadAttention):
            patterns[_any_number(f"{name}.out_proj")] = None
        elif isinstance(module, nn.Linear) and type(module).forward not in _FORWARDS:
            patterns[_any_number(name)] = None
    return "|".join(f"(.*\\.)?{pattern}" for pattern in patterns) or None


_FORWARDS = (nn.Linear.forward, IrqLinear.forward)


def packed_modules(model: Any) -> set[str]:
    """Modules whose statistics can be trained: packed linears but the head, and stacks."""
    head = model.get_output_embeddings()
    return {
        name.removesuffix(".base_layer")  # of a layer that has an adapter already
        for name, module in model.named_modules()
        if (isinstance(module, IrqLinear) and module is not head)
        or (isinstance(module, IrqExperts) and stacks(module))
    }


def _all_packed(model: nn.Module, config: LoraConfig) -> None:
    """Make `config` target all that is packed: by its names, each number standing for any."""
    names = packed_modules(model)
    patterns = {f"(.*\\.)?{_any_number(name)}" for name in names}
    target = re.compile("|".join(sorted(patterns)))
    others = (name for name, _ in model.named_modules() if name not in names)
    config.target_modules = target.pattern
    config.exclude_modules = "|".join(re.escape(n) for n in others if target.fullmatch(n)) or None


def _any_number(name: str) -> str:
    return re.sub(r"\d+", r"\\d+", re.escape(name))


def prepare_targets(model: nn.Module, config: LoraConfig) -> None:
    """Make `config`, an IEC-LoRA one, leave out of "all-linear" what `not_linear` says.

    Of rank 0 it trains statistics alone: all that is packed is meant, experts too, and nothing
    dense.
    """
    if not is_all_linear(config) or config.exclude_modules is not None:
        return
    if config.r == 0:
        _all_packed(model, config)
    else:
        config.exclude_modules = not_linear(model)


def prepare_stock_targets(model: nn.Module, config: LoraConfig) -> None:
    """The same for a stock `LoraConfig`; refuse one that PEFT would put on packed experts.

    Raises `UsageError`.
    """
    packed = [m for m in model.modules() if isinstance(m, IrqExperts)]
    if is_all_linear(config):
        left_out = not_linear(model)
        if packed:  # by name, since PEFT's shorthand takes in the stacks
            config.target_modules = sorted(_all_linear(model, left_out))
        elif config.exclude_modules is None:
            config.exclude_modules = left_out
    if not packed:
        return
    asked = _after_peft(model, config)
    stacks = {name for m in packed for name in m.packed}
    for name in sorted(asked.target_parameters or ()):
        if name.rpartition(".")[2] in stacks:
            raise UsageError(
                f"PEFT would put this LoraConfig on packed experts ({name}): use "
                "IecLoraConfig(connection='none'), the same LoRA on the other layers, or target "
                "the layers of attention alone"
            )


def _all_linear(model: Any, left_out: str | None) -> set[str]:
    """Names of all linear layers but the output head and what `left_out` matches."""
    head = model.get_output_embeddings()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not (left_out and re.fullmatch(left_out, name))
    }


def _after_peft(model: Any, config: LoraConfig) -> Any:
    """`config` as PEFT rewrites it for this architecture."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    asked = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(asked, model=model, conversions=None)
    except ValueError as error:
        raise UsageError(f"{error} (experts of this model are packed: leave them out)") from error
    return asked
