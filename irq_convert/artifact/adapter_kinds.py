"""The kinds of adapters, each said once: for `finetune --lora`, for cards, and by its settings.

A further kind is a member here, its configuration in `irq_convert.adapters.kinds`, and, where it
does not merge as a low-rank sum, a way in `irq_convert.jobs.merge`. Names alone, for help's sake.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

LORA, IEC_LORA = "LORA", "IEC_LORA"
"""PEFT's types: the stock one, and ours."""


class Connection(StrEnum):
    """Which of IEC's two elastic connections an adapter has."""

    BOTH = "both"
    INPUT = "input"
    OUTPUT = "output"
    NONE = "none"


class Statistics(StrEnum):
    """Which of a packed layer's statistics an adapter trains."""

    BOTH = "both"
    SCALE = "scale"
    TAU = "tau"


class AdapterKind(StrEnum):
    """Kind of adapter, as `finetune --lora` names it."""

    PLAIN = "plain"
    IEC = "iec"
    BLOCK = "block"
    STATISTICS = "statistics"

    @property
    def called(self) -> str:
        """What a card calls it."""
        return _CALLED[self]

    @property
    def own(self) -> bool:
        """Whether it is of our own type, not stock LoRA."""
        return self is not AdapterKind.PLAIN

    @property
    def low_rank(self) -> bool:
        """Whether it has low-rank matrices, and not statistics alone."""
        return self is not AdapterKind.STATISTICS

    @property
    def connected(self) -> bool:
        """Whether it has elastic connections unless they are switched off."""
        return self.own and self.low_rank

    @property
    def pooled(self) -> bool:
        """Whether it sees block sums of the input, so that it merges by moving tau."""
        return self is AdapterKind.BLOCK


_CALLED = {
    AdapterKind.PLAIN: "LoRA",
    AdapterKind.IEC: "IEC-LoRA",
    AdapterKind.BLOCK: "block-pooled IEC-LoRA",
    AdapterKind.STATISTICS: "an adapter of scale and tau",
}


def kind_of(settings: Mapping[str, Any]) -> AdapterKind:
    """The kind that an adapter_config.json describes; PLAIN where it is nothing of ours."""
    if settings.get("peft_type") != IEC_LORA:
        return AdapterKind.PLAIN
    if settings.get("r") == 0:
        return AdapterKind.STATISTICS
    if settings.get("pool") == "block":
        return AdapterKind.BLOCK
    none = settings.get("connection") == Connection.NONE
    return AdapterKind.PLAIN if none else AdapterKind.IEC
