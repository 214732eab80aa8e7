"""`IecLoraModel`: PEFT's LoRA tuner, strict about what it adapts and what it loads."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from irq_convert.adapters.experts import IecLoraExperts
from irq_convert.adapters.layer import IecLoraLinear
from irq_convert.adapters.statistics import refuse_mixed
from irq_convert.adapters.targets import prepare_targets
from irq_convert.artifact.adapter import BETA
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.identity import forget_identity, model_identity
from irq_convert.nn.experts import IrqExperts


class IecLoraModel(LoraModel):
    """The tuner of `IecLoraConfig`. Records which artifact the adapter belongs to."""

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        own = {nn.Linear: IecLoraLinear, Conv1D: IecLoraLinear, IrqExperts: IecLoraExperts}
        peft_config._register_custom_module(own)
        super()._prepare_model(peft_config, model)
        prepare_targets(model, peft_config)
        identity = model_identity(model)
        if peft_config.base_sha256 is None:
            peft_config.base_sha256 = identity
        elif identity not in (None, peft_config.base_sha256):
            warnings.warn(
                f"this adapter was trained on the artifact {peft_config.base_sha256[:12]}, the "
                f"model comes from {identity[:12] if identity else 'none'}: results will differ",
                stacklevel=2,
            )

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        module = LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        if isinstance(module, LoraLayer) and not isinstance(module, IecLoraLinear | IecLoraExperts):
            raise UsageError(
                f"IEC-LoRA adapts linear layers, and target_modules names a {type(target).__name__}"
                f" ({kwargs.get('target_name', 'unknown')}): leave it out, or use LoraConfig"
            )
        return module

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Give each row of a batch the adapter that `adapter_names` says.

        Raises `UsageError` where one of them moves statistics.
        """
        asked, configs = set(kwargs.get("adapter_names") or ()), dict[str, Any](self.peft_config)
        moving = {name for name, config in configs.items() if config.statistics}
        refuse_mixed(sorted(asked & moving))
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: PEFT would combine A and B of the adapters and drop their betas."""
        raise UsageError(
            "IEC-LoRA adapters cannot be added up: fold each into a plain LoRA first "
            "(irq-convert merge --to adapter)"
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        layers = [m for m in self.modules() if isinstance(m, IecLoraLinear | IecLoraExperts)]
        changed = merge or any(layer.merged for layer in layers)
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if changed:
            forget_identity(model)
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name in the file: betas are there without ".weight"."""
        stored = super()._remove_adapter_name_from_key(key, adapter_name)
        return stored.removesuffix(".weight") if stored.endswith(f"{BETA}.weight") else stored

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> Any:
        """Refuse files that lack what the model's adapter has, or hold what it has not."""
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        of_this = re.compile(rf"\.{cls.prefix}\w+\.{re.escape(adapter_name)}(\.|$)")
        wanted = {name for name, _ in model.named_parameters() if of_this.search(name)}
        # Besides, PEFT saves whole modules, biases and embeddings, under the model's own names.
        known = wanted | {name for name in model.state_dict() if cls.prefix not in name}
        remapped = {
            name: tensor
            for name, tensor in remapped.items()
            if name in known or not _is_second_copy(name, tensor, remapped, adapter_name)
        }
        for what, names in (
            ("lacks", wanted - set(remapped)),
            ("has the unknown", set(remapped) - known),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise IrqError(
                    f"the adapter {what} {min(names)}{more}: it is damaged or of another model"
                )
        return remapped


def _is_second_copy(
    name: str, tensor: torch.Tensor, tensors: dict[str, torch.Tensor], adapter_name: str
) -> bool:
    """Whether PEFT has saved a module of `modules_to_save` again, as part of the embeddings.

    It does so when the vocabulary was resized. Raises `IrqError` where the two copies differ.
    """
    copied = ".modules_to_save."
    if copied not in name:
        return False
    trained = tensors.get(name.replace(copied, f"{copied}{adapter_name}.", 1))
    if trained is None:
        return False
    if not torch.equal(trained.to(tensor.device), tensor):
        shown = name.replace(copied, ".", 1)
        raise IrqError(
            f"the adapter has {name} {list(tensor.shape)} and {shown} {list(trained.shape)}, which "
            "stand for the same tensor and differ: it is damaged: save it again"
        )
    return True
