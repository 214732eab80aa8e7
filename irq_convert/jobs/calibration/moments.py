"""Second moments of the inputs of a group of weights, summed up over chunks of windows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from irq_convert.errors import IrqError

PANEL = 256
"""Columns of H computed at a time: below the diagonal nothing is, since it is symmetric."""
ENOUGH = 8
"""Tokens for each input column from which an expert's moments are taken as they are."""


@dataclass
class Moments:
    """H `[cols, cols]`, and C where it was asked for, float32; `tokens` how many were added."""

    cols: int
    cross_wanted: bool = False
    device: str = "cpu"
    tokens: int = 0
    _upper: torch.Tensor = field(init=False)
    cross: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._upper = torch.zeros(self.cols, self.cols, device=self.device)
        if self.cross_wanted:
            self.cross = torch.zeros(self.cols, self.cols, device=self.device)

    def add(self, seen: torch.Tensor, of_source: torch.Tensor | None = None) -> None:
        """Add inputs `[tokens, cols]` of the quantized model, and those of the source."""
        self.tokens += len(seen)
        turned = seen.T
        for start in range(0, self.cols, PANEL):
            stop = start + PANEL
            self._upper[start:stop, start:].addmm_(turned[start:stop], seen[:, start:])
        if self.cross is not None and of_source is not None:
            self.cross.addmm_((of_source - seen).T, seen)

    def whole(self, name: str) -> torch.Tensor:
        """H, after which nothing is added; `IrqError` when the inputs of `name` have overflowed."""
        found = self._upper
        for start in range(0, self.cols, PANEL):
            stop = start + PANEL
            corner = found[start:stop, start:stop].triu()
            found[start:stop, start:stop] = corner + corner.triu(1).T
            found[stop:, start:stop] = found[start:stop, stop:].T
        if not bool(torch.isfinite(found.diagonal()).all()):
            raise IrqError(
                f"{name}: its inputs overflow on this text (NaN or infinite): check the source's "
                "weights, or keep the layers before it (--keep)"
            )
        return found


def shrunk(own: torch.Tensor, tokens: int, every: torch.Tensor, all_tokens: int) -> torch.Tensor:
    """The moments of an expert that few tokens reached, drawn towards those of its layer.

    What is missing to `ENOUGH` tokens a column is filled up with the mean of all experts.
    """
    missing = ENOUGH * len(own) - tokens
    if missing <= 0 or not all_tokens:
        return own
    return own + every * (missing / all_tokens)
