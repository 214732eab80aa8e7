"""From a loaded artifact to a model that trains: `attach`, and its preparation alone."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

from irq_convert.core.working_dtype import cpu_multiplies
from irq_convert.errors import UsageError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def prepare_for_training(
    model: PreTrainedModel, *, gradient_checkpointing: bool | dict[str, Any] = False
) -> PreTrainedModel:
    """Freeze `model` and, if asked, turn gradient checkpointing on; nothing is cast or copied.

    `gradient_checkpointing` may be the keyword arguments of `torch.utils.checkpoint.checkpoint`,
    such as `{"use_reentrant": True}`. (PEFT's own preparation would cast every dense parameter to
    float32 and leave checkpointing off.) Warns of a 16-bit model on a CPU that is no good at it.
    """
    if model.device.type == "cpu" and not cpu_multiplies(model.dtype):
        short = str(model.dtype).removeprefix("torch.")
        warnings.warn(
            f"torch has no fast products of {short} on this CPU: what is not packed of the model, "
            "its head above all, trains many times faster when it is loaded with "
            "dtype=torch.float32",
            stacklevel=3,
        )
    model.requires_grad_(False)
    if gradient_checkpointing is not False:
        how = gradient_checkpointing if isinstance(gradient_checkpointing, dict) else None
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)(how)
        model.config.use_cache = False
    return model


def attach(
    model: PreTrainedModel,
    config: LoraConfig | None = None,
    *,
    gradient_checkpointing: bool | dict[str, Any] = False,
    adapter_name: str = "default",
) -> PeftModel:
    """`model`, frozen, with trainable adapters on its linear layers.

    `config` is an `IecLoraConfig` (the default: rank 64, alpha 16, all linear layers but the head)
    or any `LoraConfig`, and is not changed; without `target_modules` it means "all-linear". The
    adapter's dtype is float32 whatever the model's. Experts of a mixture are not among all linear
    layers; where the files hold a tensor for each, they can be named. Raises `UsageError` when
    `model` has adapters already, or when PEFT would put them on packed stacks of experts.
    """
    from peft import PeftModel, get_peft_model

    from irq_convert.adapters.config import IecLoraConfig
    from irq_convert.adapters.register import register
    from irq_convert.adapters.targets import prepare_stock_targets

    register()
    if isinstance(model, PeftModel):
        raise UsageError("the model has an adapter already: add another with model.add_adapter")
    if config is None:
        config = IecLoraConfig(r=64, lora_alpha=16, task_type="CAUSAL_LM")
    config = copy.deepcopy(config)  # what is recorded in it is of this model alone
    if not config.target_modules and not config.target_parameters:
        config.target_modules = "all-linear"
    if not isinstance(config, IecLoraConfig):
        prepare_stock_targets(model, config)
    prepare_for_training(model, gradient_checkpointing=gradient_checkpointing)
    return get_peft_model(model, config, adapter_name=adapter_name)
