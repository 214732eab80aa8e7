"""What a search is for, and what tau may be: names alone, so that help costs no numerics.

A new objective is a member here with its meaning, a branch in `search_plan.plan_search`, and a
score in each of the three searches: `kernels/search.py`, `portable/search.py`, `triton/search.py`.
"""

from __future__ import annotations

from enum import StrEnum


class Objective(StrEnum):
    """What the search of a block looks for; `meaning` says it in a few words.

    Members equal their names as strings, and their order is that of help. What "auto" becomes is
    said by each family of codebooks (`codebook.FAMILIES`).
    """

    ENTROPY = "entropy"
    MSE = "mse"
    NONE = "none"

    @property
    def meaning(self) -> str:
        """In brackets behind the name, as help prints it."""
        return _MEANINGS[self]


_MEANINGS = {
    Objective.ENTROPY: "ICQ",
    Objective.MSE: "tau and scale by squared error",
    Objective.NONE: "plain",
}


class ZeroPoint(StrEnum):
    """What tau may be: any number, or minus a level times the scale, so that zero is a code."""

    FLOAT = "float"
    INTEGER = "integer"
