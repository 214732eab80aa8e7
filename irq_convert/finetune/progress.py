"""What a run tells whoever watches; a silent listener to be overridden."""

from __future__ import annotations


class Progress:
    """Does nothing. Called by the first process only."""

    def stage(self, text: str) -> None:
        """What goes on now, in a few words."""

    def start(self, done: int, total: int) -> None:
        """Training begins at step `done` of `total`."""

    def step(self, step: int, loss: float) -> None:
        """Step `step` is done; `loss` is the mean over the tokens of its batch."""

    def measuring(self, done: int, total: int) -> None:
        """`done` of `total` held-out examples are measured."""

    def heldout(self, step: int, loss: float) -> None:
        """The held-out loss after `step` steps."""

    def note(self, text: str) -> None:
        """Something to be said in any case."""
