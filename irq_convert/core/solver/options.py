"""How a matrix is solved: names and numbers alone, so that help costs no numerics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SolverOptions:
    """How a matrix is solved.

    `damping`: what is added to the diagonal of H for the sweep, in mean diagonals. `rounds` of
    refitting and coordinate descent after it. `sweep`: False leaves the codes that the search gave.
    """

    damping: float = 0.1
    rounds: int = 3
    sweep: bool = True
