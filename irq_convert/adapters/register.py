"""Making PEFT know IEC-LoRA: its type, configuration, tuner and prefix."""

from __future__ import annotations

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from irq_convert.adapters.peft_type import iec_lora


def register() -> None:
    """Make `get_peft_model`, `PeftModel.from_pretrained` and the like know the type; idempotent."""
    from irq_convert.adapters.config import IecLoraConfig
    from irq_convert.adapters.model import IecLoraModel

    kind = iec_lora()
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = IecLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = IecLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = IecLoraModel.prefix
