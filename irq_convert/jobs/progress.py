"""What a job tells the one who waits; the base class says nothing."""

from __future__ import annotations


class Progress:
    """Receives the course of the work. Override what should be shown."""

    def stage(self, text: str) -> None:
        """What is going on where nothing can be counted, in a word."""

    def phase(self, text: str, tensors: int, nbytes: int) -> None:
        """Work begins that can be counted: in a word what, how many tensors, how many bytes."""

    def resumed(self, tensors: int, nbytes: int) -> None:
        """So much of the phase was done before it began."""

    def note(self, text: str) -> None:
        """A remark that a person should see."""

    def kept(self, text: str) -> None:
        """The work was stopped: what is kept, and how to go on. Nothing else says so."""

    def advance(self, nbytes: int, finished: int) -> None:
        """`nbytes` of the phase are done, and so many tensors came to their end."""
