"""What a conversion tells the one who waits; the base class says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from irq_convert.convert.plan import ConversionPlan


class Progress:
    """Receives the course of a conversion. Override what should be shown."""

    def stage(self, text: str) -> None:
        """What is going on where nothing can be counted, in a word."""

    def start(self, plan: ConversionPlan) -> None:
        """The first tensor is about to be read."""

    def note(self, text: str) -> None:
        """A remark that a person should see."""

    def advance(self, nbytes: int, finished: bool) -> None:
        """`nbytes` of the source are done, and with `finished` a whole tensor."""
