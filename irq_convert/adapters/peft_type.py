"""Teaching PEFT the type "IEC_LORA".

An own type, because an IEC adapter saved as plain LORA would load in stock PEFT with its betas
silently dropped. PEFT's own registration cannot be used: it wants a new member of an enum and a
prefix that nobody has, and ours is LoRA's, "lora_". All that is private to PEFT is in this file
and in `layer.py`; tests/adapters hold PEFT to it.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType

from irq_convert.artifact.adapter_kinds import IEC_LORA


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
