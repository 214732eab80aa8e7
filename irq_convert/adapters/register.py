"""Making PEFT know IEC-LoRA: its type, configuration, tuner, prefix, and the names of its betas."""

from __future__ import annotations

import functools
import re
from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import transformers_weight_conversion as conversion

from irq_convert.adapters.peft_type import iec_lora


def register() -> None:
    """Make `get_peft_model`, `PeftModel.from_pretrained` and the like know the type; idempotent."""
    from irq_convert.adapters.config import IecLoraConfig
    from irq_convert.adapters.model import IecLoraModel
    from irq_convert.adapters.stock_tuners import explain_failures

    kind = iec_lora()
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = IecLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = IecLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = IecLoraModel.prefix
    _name_betas()
    explain_failures()


def _name_betas() -> None:
    """Let transformers' own `load_adapter` find betas, which files hold without ".weight"."""
    stock: Any = conversion.build_peft_weight_mapping
    if hasattr(stock, "irq_convert"):
        return

    @functools.wraps(stock)
    def build_peft_weight_mapping(
        weight_conversions: Any, adapter_name: str, peft_config: Any = None
    ) -> Any:
        from transformers.core_model_loading import WeightRenaming

        from irq_convert.artifact.adapter import BETA

        found = stock(weight_conversions, adapter_name, peft_config=peft_config)
        if found and getattr(peft_config, "peft_type", None) == iec_lora():
            pattern = rf"({BETA}\.{re.escape(adapter_name)})$"
            found.append(WeightRenaming(pattern, r"\1.weight"))
        return found

    build_peft_weight_mapping.irq_convert = True  # type: ignore[attr-defined]
    conversion.build_peft_weight_mapping = build_peft_weight_mapping
