"""The way back: how much the model's prediction turns on every output of every linear weight.

One label a token is drawn from the source's own prediction, and the gradient of its logarithm goes
back layer by layer, from the states that the way forward has left. Its mean square at an output,
over tokens, is the diagonal of the Fisher information there, and half the Fisher-weighted square of
a small change of the weights is the KL divergence that it causes: for a change dW of one matrix

    KL = 1/2 sum_q b_q sum_p a_p dW_qp^2,

a_p being the mean square of input p, where the changes of different weights are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from irq_convert.errors import IrqError
from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.calibration.sites import Site, StoredRows, find_sites, listening
from irq_convert.jobs.calibration.squares import Squares
from irq_convert.jobs.calibration.states import StateFile, chunks, state_file
from irq_convert.jobs.calibration.text import Windows
from irq_convert.jobs.common.memory import give_back_memory
from irq_convert.jobs.sizing.ends import Ends, embedding_squares
from irq_convert.jobs.sizing.forward import layer_bytes
from irq_convert.progress import Progress

Damage = Callable[[str, torch.Tensor, np.ndarray | None, np.ndarray], None]
"""Called with a tensor's name, its weights `[rows, cols]`, a of its columns `[matrices, cols]` or
None where no token has reached it, and b of its rows. Of an embedding that is the head, twice."""


@dataclass
class Backward:
    """The way back over the windows that are not held out; `states(n)` is the file before layer n.

    `means` are the mean squares of inputs by tensor. The gradients wait in a file in `folder`.
    """

    model: LayeredModel
    windows: Windows
    tensors: frozenset[str]
    ends: Ends
    means: Mapping[str, np.ndarray]
    states: Callable[[int], Path]
    folder: Path
    progress: Progress

    def begin(self, behind: StateFile, files: ExitStack, seed: int, damage: Damage) -> None:
        """Draw labels, note the gradient behind the last layer, and tell `damage` of the head.

        Called inside `outside`.
        """
        count, tokens = self.windows.calibrating, self.windows.ids.shape[1]
        path = self.folder / "gradients"
        self._width = behind.width
        self._gradients = files.enter_context(
            state_file(path, count, tokens, behind.width, new=True)
        )
        generator = torch.Generator().manual_seed(seed)
        sites = () if self.ends.head is None else (self.ends.head,)
        inputs, squares = Squares(sites), _OutputSquares(sites)
        for number in range(count):
            states = behind.read(number, number + 1).to(self.model.device).requires_grad_()
            with (
                torch.enable_grad(),
                listening(self.model, sites, inputs.listen, squares.listen),
            ):
                logits = self.model.finish(self.windows.ids[number : number + 1], states)[0].float()
            odds = logits.detach().softmax(-1)
            # What is drawn, and minus the gradient of its logarithm.
            drawn = torch.multinomial(odds.cpu(), 1, generator=generator).to(odds.device)
            slope = odds.scatter_add(1, drawn, -torch.ones_like(drawn, dtype=odds.dtype))
            (found,) = torch.autograd.grad(logits, states, slope)
            self._gradients.write(number, found)
        means = inputs.means(self.model.source.checkpoint)
        for site in sites:
            self._tell(site, squares, means, damage)

    def run(self, damage: Damage) -> None:
        """Go back through all layers and the embedding, and tell `damage` of each weight.

        Raises `IrqError` naming the layer for gradients that overflow.
        """
        for number in reversed(range(len(self.model.layers))):
            self.progress.stage(f"measuring {self.model.layers[number]}, backwards")
            sites = find_sites(self.model, number, self.tensors)
            with self.model.layer(number):
                squares = _OutputSquares(sites)
                self._through(number, sites, squares)
                for site in sites:
                    self._tell(site, squares, self.means, damage)
            self.states(number).unlink(missing_ok=True)
            give_back_memory()
            self.progress.advance(layer_bytes(self.model, number), finished=1)
        if self.ends.embedding is not None:
            module, tensor = self.ends.embedding
            with self.model.outside():
                f, g = embedding_squares(self.model, module, self.windows, self._gradients)
                weight = self.model.module(module).get_parameter("weight")
                damage(tensor, weight.data, g[None], f)

    def _tell(
        self,
        site: Site,
        squares: _OutputSquares,
        means: Mapping[str, np.ndarray],
        damage: Damage,
    ) -> None:
        for stored in site.stored:
            name, weight = stored.tensor, site.read(self.model, stored)
            inputs = None if name not in means else np.atleast_2d(means[name])
            damage(name, weight, inputs, squares.of(site, stored, self._tokens))

    @property
    def _tokens(self) -> int:
        return self.windows.calibrating * int(self.windows.ids.shape[1])

    def _through(self, number: int, sites: tuple[Site, ...], squares: _OutputSquares) -> None:
        model, windows = self.model, self.windows
        layer, tokens = model.module(model.layers[number]), windows.ids.shape[1]
        shape = len(windows.ids), tokens, self._width
        with state_file(self.states(number), *shape, new=False) as file:
            for start, stop in chunks(0, windows.calibrating, tokens):
                states = file.read(start, stop).to(model.device).requires_grad_()
                with (
                    torch.enable_grad(),
                    listening(model, sites, _nothing, squares.listen),
                ):
                    found = model.call(number, stop - start).run(layer, states)
                above = self._gradients.read(start, stop).to(model.device)
                (below,) = torch.autograd.grad(found, states, above)
                if not bool(torch.isfinite(below).all()):
                    raise IrqError(
                        f"{model.layers[number]}: gradients overflow on this text (NaN or "
                        "infinite): check the source's weights"
                    )
                self._gradients.write(start, below)


class _OutputSquares:
    """Sums of squares of gradients at the outputs of every matrix of some sites."""

    def __init__(self, sites: tuple[Site, ...]) -> None:
        self._sums: dict[str, dict[int, torch.Tensor]] = {site.key: {} for site in sites}

    def listen(self, key: str, expert: int, y: torch.Tensor) -> None:
        """A `Listener` to outputs: hears of their gradient when it comes."""

        def heard(gradient: torch.Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1])
            found = rows.square().sum(0).cpu().double()  # not every device has float64
            own = self._sums[key]
            own[expert] = own[expert] + found if expert in own else found

        if y.requires_grad:
            y.register_hook(heard)

    def of(self, site: Site, stored: StoredRows, tokens: int) -> np.ndarray:
        """Mean squares over `tokens` of the rows of `stored`; 0 where nothing came.

        An expert that no token has reached has the mean of those of its layer.
        """
        sums: Mapping[int, torch.Tensor] = self._sums[site.key]
        parts = []
        for rows in stored.rows:
            own = sums.get(rows.matrix)
            if own is None and sums:
                own = torch.stack([*sums.values()]).mean(0)
            count = rows.stop - rows.start
            parts.append(np.zeros(count) if own is None else own[rows.start : rows.stop].numpy())
        found: np.ndarray = np.concatenate(parts) / tokens
        return found


def _nothing(key: str, expert: int, x: torch.Tensor) -> None:
    """A listener to inputs, which are known."""
