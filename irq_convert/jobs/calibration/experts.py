"""What the experts of a layer are given: second moments of each, as many as memory has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from irq_convert.jobs.calibration.moments import ENOUGH, Moments, shrunk
from irq_convert.jobs.calibration.sites import Site, StoredRows
from irq_convert.nn.recording import Listener

ROOM = 1 << 30
"""Bytes of the moments of experts that are summed up at once."""

Pass = Callable[[Listener], None]
"""Runs all windows through the layer and tells the listener what its weights are given."""


@dataclass(frozen=True)
class ExpertInputs:
    """Of the experts of `site`: `tokens` int64 `[experts]`, mean squares, and moments of all."""

    site: Site
    tokens: np.ndarray
    squares: np.ndarray
    every: torch.Tensor

    @classmethod
    def count(cls, site: Site, pass_over: Pass, device: str = "cpu") -> ExpertInputs:
        """Look at all windows once; moments are summed up on `device`."""
        tokens = np.zeros(site.matrices, np.int64)
        squares = np.zeros((site.matrices, site.cols), np.float64)
        every = Moments(site.cols, device=device)

        def listen(key: str, expert: int, x: torch.Tensor) -> None:
            if key == site.key and x.numel():
                rows = x.reshape(-1, site.cols)
                tokens[expert] += len(rows)
                squares[expert] += rows.double().square().sum(0).cpu().numpy()
                every.add(rows)

        pass_over(listen)
        return cls(site, tokens, squares, every.whole(site.key))

    @property
    def few(self) -> int:
        """How many experts saw too few tokens to be taken alone."""
        return int((self.tokens < ENOUGH * self.site.cols).sum())

    def importance(self, stored: StoredRows) -> np.ndarray:
        """Squares of each column, `[matrices of stored, cols]`, with what few tokens lack."""
        total = max(1, int(self.tokens.sum()))
        missing = np.maximum(0, ENOUGH * self.site.cols - self.tokens) / total
        of_all = self.every.diagonal().double().cpu().numpy()
        filled = self.squares + missing[:, None] * of_all[None]
        return filled[[rows.matrix for rows in stored.rows]]

    def moments(self, pass_over: Pass) -> Iterator[tuple[int, torch.Tensor]]:
        """H of each expert, drawn towards that of all where its tokens are few."""
        site, total = self.site, int(self.tokens.sum())
        room = max(1, ROOM // (4 * site.cols**2))
        for first in range(0, site.matrices, room):
            found = {
                expert: Moments(site.cols, device=str(self.every.device))
                for expert in range(first, min(site.matrices, first + room))
            }

            def listen(
                key: str, expert: int, x: torch.Tensor, found: dict[int, Moments] = found
            ) -> None:
                if key == site.key and expert in found and x.numel():
                    found[expert].add(x.reshape(-1, site.cols))

            pass_over(listen)
            for expert, own in found.items():
                yield expert, shrunk(own.whole(site.key), own.tokens, self.every, total)
