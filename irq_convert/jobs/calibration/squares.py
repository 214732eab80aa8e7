"""Sums of squares of what the linear weights of a model are given, while it runs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from irq_convert.checkpoint.source import Checkpoint
from irq_convert.errors import IrqError
from irq_convert.jobs.calibration.sites import Site

ROWS = 1024
"""Inputs that are squared in float64 at once."""


class Squares:
    """Listens to `sites`, and knows afterwards the mean square of each input column."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = {site.key: site for site in sites}
        self._sums = {
            key: np.zeros((site.matrices, site.cols), np.float64)
            for key, site in self._sites.items()
        }
        self._tokens = {key: np.zeros(s.matrices, np.int64) for key, s in self._sites.items()}
        self._last: tuple[torch.Tensor, np.ndarray] | None = None

    def listen(self, key: str, expert: int, x: torch.Tensor) -> None:
        """A `Listener`: `x`, `[..., cols]`, is what matrix `expert` of a site is given."""
        rows = x.detach().reshape(-1, self._sites[key].cols)
        if not len(rows):
            return
        # Weights side by side, as those of queries and keys, are given one and the same tensor.
        if self._last is None or self._last[0] is not x:
            self._last = x, _sum_of_squares(rows)
        self._sums[key][expert] += self._last[1]
        self._tokens[key][expert] += len(rows)

    def forget(self) -> None:
        """Let go of the last inputs."""
        self._last = None

    def means(self, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        """Mean squares by the names of the files: `[cols]`, or `[matrices, cols]` of a stack.

        An expert that no token has reached has the mean of all that its layer's experts were given;
        what no token has reached at all is left out. Raises `IrqError` naming the module for inputs
        that have overflowed.
        """
        found: dict[str, np.ndarray] = {}
        for key, site in self._sites.items():
            sums, tokens = self._sums[key], self._tokens[key]
            if not tokens.any():
                continue
            if not np.isfinite(sums).all():
                raise IrqError(
                    f"{checkpoint.folder}: the inputs of {site.module} overflow on this text (NaN "
                    "or infinite): check the weights of the layers before it"
                )
            means = sums / np.maximum(1, tokens)[:, None]
            means[tokens == 0] = sums.sum(0) / tokens.sum()
            for stored in site.stored:
                owners = [rows.matrix for rows in stored.rows]
                stack = len(checkpoint.tensors[stored.tensor].shape) == 3
                found[stored.tensor] = means[owners] if stack else means[owners[0]]
        return found

    @property
    def unreached(self) -> int:
        """How many experts no token has reached, in stacks of which others were."""
        return sum(int((each == 0).sum()) for each in self._tokens.values() if each.any())


def _sum_of_squares(rows: torch.Tensor) -> np.ndarray:
    """Of each column of `rows`, in float64."""
    if rows.device.type == "mps":  # which has no float64
        rows = rows.cpu()
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(ROWS):
        total += part.double().square().sum(0)
    found: np.ndarray = total.cpu().numpy()
    return found
