"""What a conversion or a merge tells the one who waits; the base class says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from irq_convert.convert.plan import ConversionPlan


class Progress:
    """Receives the course of the work. Override what should be shown."""

    def stage(self, text: str) -> None:
        """What is going on where nothing can be counted, in a word."""

    def start(self, plan: ConversionPlan) -> None:
        """The first tensor of a conversion is about to be read."""
        self.phase("quantizing", len(plan.tensors), plan.checkpoint.nbytes)

    def phase(self, text: str, tensors: int, nbytes: int) -> None:
        """Work begins that can be counted: in a word what, how many tensors, how many bytes."""

    def note(self, text: str) -> None:
        """A remark that a person should see."""

    def advance(self, nbytes: int, finished: bool) -> None:
        """`nbytes` of the phase are done, and with `finished` a whole tensor."""
