"""Teaching PEFT the type "IEC_LORA".

An own type, because an IEC adapter saved as plain LORA would load in stock PEFT with its betas
silently dropped. PEFT's own registration cannot be used: it wants a new member of an enum and a
prefix that nobody has, and ours is LoRA's, "lora_". All that is private to PEFT is in this file
and in `layer.py`; tests/adapters hold PEFT to it.
"""

from __future__ import annotations

import sys
from typing import Any

from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from irq_convert.hf import autoload

IEC_LORA = "IEC_LORA"
_HOMES = {"config": "IecLoraConfig", "layer": "IecLoraLinear", "model": "IecLoraModel"}


def iec_lora() -> Any:
    """The member of `PeftType` that stands for IEC-LoRA, made on first use."""
    if IEC_LORA in PeftType.__members__:
        return PeftType[IEC_LORA]
    member = str.__new__(PeftType, IEC_LORA)
    member._name_ = IEC_LORA
    member._value_ = IEC_LORA
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    # The attribute comes first: an enum refuses to set one that is a member already.
    setattr(PeftType, IEC_LORA, member)
    PeftType._member_names_.append(IEC_LORA)
    PeftType._member_map_[IEC_LORA] = member
    PeftType._value2member_map_[IEC_LORA] = member
    return member


def register() -> None:
    """Make `get_peft_model`, `PeftModel.from_pretrained` and the like know the type; idempotent.

    Does nothing while one of our own modules is half imported: that import is what led here, and
    the module registers when it is complete.
    """
    for name, what in _HOMES.items():
        module = sys.modules.get(f"irq_convert.adapters.{name}")
        if module is not None and not hasattr(module, what):
            return
    from irq_convert.adapters.config import IecLoraConfig
    from irq_convert.adapters.model import IecLoraModel

    kind = iec_lora()
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = IecLoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = IecLoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = IecLoraModel.prefix


autoload.install()  # where importing this module is what first imported PEFT
