"""What a training run tells whoever watches, beside what every job tells."""

from __future__ import annotations

from irq_convert.progress import Progress


class TrainingProgress(Progress):
    """Does nothing. Called by the first process only."""

    def called(self, held: str, trained: str) -> None:
        """What the numbers of the run are: those of held-out data, and those of steps."""

    def waiting(self, text: str) -> None:
        """What the work at hand waits for, in a few words; "" when it goes on."""

    def start(self, done: int, total: int) -> None:
        """Training begins at step `done` of `total`."""

    def step(self, step: int, loss: float) -> None:
        """Step `step` is done; `loss` is the mean over the tokens of its batch."""

    def measuring(self, done: int, total: int) -> None:
        """`done` of `total` held-out examples are measured."""

    def heldout(self, step: int, loss: float) -> None:
        """The held-out loss after `step` steps."""
