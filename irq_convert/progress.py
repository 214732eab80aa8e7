"""What a job tells the one who waits; the base class says nothing."""

from __future__ import annotations


class Progress:
    """Receives the course of the work. Override what should be shown.

    Work that can be counted has two counts: things (tensors, windows of text) and a size, which is
    bytes where things differ in size, and else the number of things again.
    """

    def stage(self, text: str) -> None:
        """What is going on where nothing can be counted, in a word."""

    def phase(self, text: str, things: int, size: int) -> None:
        """Work begins that can be counted: in a word what, how many things, of what size."""

    def resumed(self, things: int, size: int) -> None:
        """So much of the phase was done before it began."""

    def note(self, text: str) -> None:
        """A remark that a person should see."""

    def kept(self, text: str) -> None:
        """The work was stopped: what is kept, and how to go on. Nothing else says so."""

    def advance(self, size: int, finished: int) -> None:
        """`size` of the phase is done, and so many things came to their end."""
