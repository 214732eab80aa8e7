"""One pass of a model over a text: layer by layer as its weights are read, or loaded whole."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from irq_convert.checkpoint.source import Checkpoint
from irq_convert.checkpoint.system import format_bytes
from irq_convert.core.threads import torch_threads
from irq_convert.errors import IrqError
from irq_convert.hf.causal_lm import load_causal_lm
from irq_convert.hf.layer_weights import WeightSource
from irq_convert.hf.layered import LayeredModel
from irq_convert.hf.limits import check_vocabulary
from irq_convert.jobs.calibration.sites import Site, find_sites, listening, sites_below
from irq_convert.jobs.calibration.squares import Squares
from irq_convert.jobs.calibration.states import StateFile, chunks, state_file
from irq_convert.jobs.common.memory import available_memory
from irq_convert.progress import Progress

SPARE = 1_000_000_000
"""Beside the weights of a model that is loaded whole: activations, logits, the libraries."""


@dataclass
class Pass:
    """`ids`, int64 `[windows, tokens]`, run through a model; what its `tensors` were given.

    Hidden states wait in a file beside `out` that has no name, and so is gone with the process.
    """

    ids: torch.Tensor
    tensors: Collection[str]
    out: Path
    progress: Progress
    threads: int | None = None
    unreached: int = field(default=0, init=False)
    """Experts that no token has reached."""

    def layered(self, model: LayeredModel) -> dict[str, np.ndarray]:
        """Mean squares by tensor, with one layer in memory at a time.

        Raises `NotLayered`, and `IrqError` naming the layer for activations that overflow.
        """
        checkpoint = model.source.checkpoint
        layers = [find_sites(model, n, self.tensors) for n in range(len(model.layers))]
        sizes = [_nbytes(checkpoint, sites) for sites in layers]
        self.progress.phase("measuring", len(layers), sum(sizes))
        model.read_order = model.plan_reading(0, passes=1, finish=False)
        found: dict[str, np.ndarray] = {}
        with torch.no_grad(), torch_threads(self.threads), self._begin(model) as states:
            for number, sites in enumerate(layers):
                squares = Squares(sites)
                with model.layer(number) as layer, listening(model, sites, squares.listen):
                    for start, stop in self._chunks():
                        call = model.call(number, stop - start)
                        given = states.read(start, stop).to(model.device)
                        states.write(start, call.run(layer, given))
                squares.forget()
                found |= self._take(squares, checkpoint)
                self.progress.advance(sizes[number], finished=1)
        return found

    def _chunks(self) -> Iterator[tuple[int, int]]:
        return chunks(0, *self.ids.shape)

    @contextmanager
    def _begin(self, model: LayeredModel) -> Iterator[StateFile]:
        """The states of all windows before the first layer, in a file that they stay in."""
        path = self.out.with_name(f".{self.out.name}.states-{os.getpid()}")
        count, width = self.ids.shape
        file: StateFile | None = None
        with ExitStack() as stack:
            stack.callback(path.unlink, missing_ok=True)
            with model.outside():
                for start, stop in self._chunks():
                    states = model.begin(self.ids[start:stop])
                    if file is None:
                        made = state_file(path, count, width, states.shape[-1], new=True)
                        file = stack.enter_context(made)
                        path.unlink()
                    file.write(start, states)
            assert file is not None
            yield file

    def whole(self, folder: Path, checkpoint: Checkpoint, device: str) -> dict[str, np.ndarray]:
        """Mean squares by tensor, of the model in `folder` loaded by transformers.

        Raises `IrqError` where it does not fit in memory, and as loading it does.
        """
        require_memory(checkpoint, device)
        self.progress.stage("loading the model")
        with torch.no_grad(), torch_threads(self.threads):
            loaded = load_causal_lm(folder, torch.float32, device)
            check_vocabulary(loaded, self.ids)
            source = WeightSource.of(loaded, checkpoint)
            model = LayeredModel(loaded, (), source, device)
            sites = sites_below(model, "", self.tensors)
            squares = Squares(sites)
            self.progress.phase("measuring", len(self.ids), len(self.ids))
            with listening(model, sites, squares.listen):
                for window in self.ids:
                    loaded(input_ids=window[None].to(device), use_cache=False)
                    squares.forget()
                    self.progress.advance(1, finished=1)
        return self._take(squares, checkpoint)

    def _take(self, squares: Squares, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
        self.unreached += squares.unreached
        return squares.means(checkpoint)


def whole_bytes(checkpoint: Checkpoint) -> int:
    """What the model takes in memory in float32."""
    return 4 * sum(info.numel for info in checkpoint.tensors.values())


def require_memory(checkpoint: Checkpoint, device: str) -> None:
    """Raise `IrqError` where the whole model does not fit; a GPU says so itself."""
    needed, free = whole_bytes(checkpoint) + SPARE, available_memory()
    if device == "cpu" and needed > free:
        raise IrqError(
            f"{checkpoint.folder}: cannot be run layer by layer, and whole it takes "
            f"{format_bytes(needed)} of memory in float32, of which {format_bytes(free)} are free: "
            "measure on a larger machine, or give quantize an imatrix of llama.cpp"
        )


def _nbytes(checkpoint: Checkpoint, sites: tuple[Site, ...]) -> int:
    stored = (each.tensor for site in sites for each in site.stored)
    return sum(checkpoint.tensors[name].nbytes for name in stored)
