"""What calibrating with data is asked to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from irq_convert.core.solver.options import SolverOptions
from irq_convert.errors import UsageError

TOKENS, WINDOW = 65_536, 512
CORRECTION, DAMPING = 0.5, 0.1
"""Defaults."""
SELF = "self"
"""Instead of a text: tokens that the source itself samples."""


@dataclass(frozen=True)
class LoopOptions:
    """What one run of the loop goes by.

    `correction`: how much of what earlier layers got wrong is corrected for, 0 to 1. `ridge` (mean
    diagonals of H) holds the correction back, `damping` the sweep; `rounds` of refitting and
    coordinate descent after it, and `refine` of least squares in the search before, where the
    weights' own options ask for none. `sweep`: False leaves the codes that the search gave.
    """

    correction: float
    ridge: float
    damping: float
    rounds: int
    refine: int
    sweep: bool

    @property
    def solver(self) -> SolverOptions:
        """How each matrix is solved."""
        return SolverOptions(self.damping, self.rounds, self.sweep)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of one calibration.

    `text`: a file, the name of a Hub dataset, or "self". `tokens` at most, in windows of `window`
    tokens (None: 512, at most the model's context), chosen by `seed` where the text has more. One
    window in `held_out` judges the result. The others are fields of `LoopOptions`; of several
    values of `correction` and `damping` every pair is tried, and the one with the lowest KL on the
    held-out windows is kept. Raises `UsageError` for numbers out of range.
    """

    text: str
    tokens: int = TOKENS
    window: int | None = None
    seed: int = 0
    held_out: int = 8
    correction: tuple[float, ...] = (CORRECTION,)
    ridge: float = 0.05
    damping: tuple[float, ...] = (DAMPING,)
    rounds: int = 3
    refine: int = 10
    sweep: bool = True

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 2:
            raise UsageError(f"--calibration-window {self.window}: at least 2 tokens")
        least = self.window or 2
        if self.tokens < 2 * least:
            raise UsageError(
                f"--calibration-tokens {self.tokens}: at least two windows of {least}, one "
                "to calibrate and one to judge; give more, or a smaller --calibration-window"
            )
        if self.held_out < 2:
            raise UsageError(f"held_out {self.held_out}: one window in two at most is held out")
        for name in ("correction", "damping"):  # a notebook says correction=0.5
            given = getattr(self, name)
            many = (given,) if isinstance(given, int | float) else tuple(given)
            object.__setattr__(self, name, tuple(map(float, many)))
        if not self.correction or not all(0 <= correction <= 1 for correction in self.correction):
            raise UsageError(f"--correction {_listed(self.correction)}: from 0 to 1")
        if not self.damping or not all(0 < damping < 100 for damping in self.damping):
            raise UsageError(f"--damping {_listed(self.damping)}: above 0, in mean diagonals")
        if not self.ridge > 0 or not 0 <= self.rounds <= 100 or not 0 <= self.refine <= 100:
            raise UsageError("ridge has to be above 0, rounds and refine from 0 to 100")

    @property
    def width(self) -> int:
        """Tokens of a window."""
        return self.window or WINDOW

    @property
    def choices(self) -> tuple[LoopOptions, ...]:
        """Everything that is tried."""
        return tuple(
            LoopOptions(correction, self.ridge, damping, self.rounds, self.refine, self.sweep)
            for correction in dict.fromkeys(self.correction)
            for damping in dict.fromkeys(self.damping)
        )

    def to_dict(self) -> dict[str, Any]:
        """What decides the bytes of the artifact; the text is told by its hash elsewhere."""
        found = asdict(self)
        del found["text"]
        return {**found, "correction": list(self.correction), "damping": list(self.damping)}


def _listed(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
