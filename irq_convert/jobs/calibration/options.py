"""What calibrating with data is asked to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from irq_convert.core.solver.options import SolverOptions
from irq_convert.errors import UsageError

TOKENS, WINDOW = 65_536, 512
"""Defaults."""
SELF = "self"
"""Instead of a text: tokens that the source itself samples."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of one calibration.

    `text`: a file, the name of a Hub dataset, or "self". `tokens` at most, in windows of `window`
    tokens, chosen by `seed` where the text has more. One window in `held_out` judges the result and
    chooses nothing else. `alpha`: how much of what earlier layers got wrong is corrected for, None
    to choose it by the held-out windows among `ALPHAS`. `ridge` (mean diagonals of H) holds the
    correction back, `damping` the sweep; `rounds` of refitting and coordinate descent.
    Raises `UsageError` for numbers out of range.
    """

    text: str
    tokens: int = TOKENS
    window: int = WINDOW
    seed: int = 0
    held_out: int = 8
    alpha: float = 0.5
    ridge: float = 0.05
    damping: float = 0.05
    rounds: int = 2
    sweep: bool = True

    def __post_init__(self) -> None:
        if self.window < 2:
            raise UsageError(f"--calibration-window {self.window}: at least 2 tokens")
        if self.tokens < 2 * self.window:
            raise UsageError(
                f"--calibration-tokens {self.tokens}: at least two windows of {self.window}, one "
                "to calibrate and one to judge; give more, or a smaller --calibration-window"
            )
        if self.held_out < 2:
            raise UsageError(f"held_out {self.held_out}: one window in two at most is held out")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha {self.alpha}: from 0 to 1")
        if self.ridge <= 0 or self.damping <= 0 or not 0 <= self.rounds <= 100:
            raise UsageError("ridge and damping have to be above 0, rounds from 0 to 100")

    @property
    def solver(self) -> SolverOptions:
        """How each matrix is solved."""
        return SolverOptions(self.damping, self.rounds, self.sweep)

    def to_dict(self) -> dict[str, Any]:
        """What decides the bytes of the artifact; the text is told by its hash elsewhere."""
        found = asdict(self)
        del found["text"]
        return found
