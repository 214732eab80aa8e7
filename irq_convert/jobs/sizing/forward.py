"""One pass of the source over a text, layer by layer, with streams of it that are quantized.

Every stream is the held-out windows run through the same model with other weights: all of one
width, a mix, or whatever is to be compared. What comes out is how far each is from the source.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.importance import Shares, column_shares
from irq_convert.core.quantize import quantize_with_stats
from irq_convert.core.spec import QuantSpec
from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.calibration.judge import divergences
from irq_convert.jobs.calibration.sites import Site, StoredRows, find_sites, listening
from irq_convert.jobs.calibration.squares import Squares
from irq_convert.jobs.calibration.states import StateFile, chunks, state_file
from irq_convert.jobs.calibration.text import Windows
from irq_convert.jobs.common.memory import give_back_memory
from irq_convert.jobs.common.metrics import MeanEstimate
from irq_convert.jobs.sizing.ends import Ends
from irq_convert.progress import Progress

Streams = Mapping[str, Mapping[str, QuantSpec | None]]
"""How each tensor of the files is quantized, None for not at all, by the name of a stream."""


@dataclass
class Forward:
    """A pass over `windows`, whose states wait in `folder`.

    `weigh` says by what errors count: importance float64 `[matrices, cols]` by tensor, the
    "measured" one of this pass itself, or None for all alike. With `keep_states` the source's
    states before every layer stay for a way back.
    """

    model: LayeredModel
    windows: Windows
    streams: Streams
    weigh: Mapping[str, np.ndarray] | str | None
    folder: Path
    progress: Progress
    threads: int | None = None
    keep_states: bool = False
    means: dict[str, np.ndarray] = field(default_factory=dict, init=False)
    """Mean squares of inputs, by tensor, of the windows that are not held out."""
    unreached: int = field(default=0, init=False)
    """How many experts no token of these windows has reached."""

    def run(self, behind: Callable[[StateFile], None] | None = None) -> dict[str, MeanEstimate]:
        """KL divergence to the source of every stream, on the held-out windows.

        `behind` is called with the source's states behind the last layer, inside `outside`. Raises
        `IrqError` for inputs that overflow or a disk that refuses; `NotLayered`.
        """
        self.tensors = frozenset(name for stream in self.streams.values() for name in stream)
        with ExitStack() as files:
            current = self._begin(files)
            for number in range(len(self.model.layers)):
                current = self._layer(number, current, files)
                self.progress.advance(layer_bytes(self.model, number), finished=1)
            first = self.windows.calibrating
            at = {name: (file, 0 if name else first) for name, file in current.items()}
            source = at.pop("")
            with self.model.outside():
                found = self._judged(source, at)
                if behind is not None:
                    behind(current[""])
                return found

    def _judged(
        self, source: tuple[StateFile, int], streams: Mapping[str, tuple[StateFile, int]]
    ) -> dict[str, MeanEstimate]:
        """How far each of `streams` is, with its own tables; without any, of all at once."""
        ids = self.windows.ids[self.windows.calibrating :]
        last = Ends.of(self.model, self.tensors).last
        if not last:
            return divergences(self.model, ids, {"source": source, **streams})
        found: dict[str, MeanEstimate] = {}
        for names in self._alike(last):
            own = {"source": source, **{name: streams[name] for name in names}}
            found |= divergences(self.model, ids, own, self._tables(names[0], last))
        return found

    def _tables(self, stream: str, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The tables `names` as a stream has them; called inside `outside`."""
        return {
            name: self._rounded(name, weight, spec)
            for name, weight in self.model.tables().items()
            if name in names and (spec := self.streams[stream].get(name)) is not None
        }

    def states(self, number: int) -> Path:
        """Where the source's states before layer `number` are."""
        return self.folder / f"source-{number:05}"

    def _begin(self, files: ExitStack) -> dict[str, StateFile]:
        """The states before the first layer; the source's go by the name ""."""
        ids, first = self.windows.ids, self.windows.calibrating
        current: dict[str, StateFile] = {}
        with self.model.outside():
            for start, stop in self._chunks():
                states = self.model.begin(ids[start:stop])
                if not start:
                    self._width = states.shape[-1]
                    current = self._open(0, files)
                current[""].write(start, states)
            looked_up = Ends.of(self.model, self.tensors).first
            for names in self._alike(looked_up):
                tables = self._tables(names[0], looked_up)
                with self.model.source.replaced(self.model.model, tables):
                    for start, stop in chunks(first, len(ids), ids.shape[1]):
                        states = self.model.begin(ids[start:stop])
                        for name in names:
                            current[name].write(start - first, states)
        return current

    def _open(self, number: int, files: ExitStack) -> dict[str, StateFile]:
        found = {}
        count, tokens = self.windows.ids.shape
        for place, name in enumerate(["", *self.streams]):
            path = self.folder / f"stream-{place}-{number:05}" if name else self.states(number)
            windows = self.windows.held_out if name else count
            opened = state_file(path, windows, tokens, self._width, new=True)
            found[name] = files.enter_context(opened)
        return found

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """All windows, those held out never together with others."""
        count, tokens = self.windows.ids.shape
        yield from chunks(0, self.windows.calibrating, tokens)
        yield from chunks(self.windows.calibrating, count, tokens)

    def _layer(
        self, number: int, current: dict[str, StateFile], files: ExitStack
    ) -> dict[str, StateFile]:
        model, first = self.model, self.windows.calibrating
        self.progress.stage(f"measuring {model.layers[number]}")
        sites = find_sites(model, number, self.tensors)
        following = self._open(number + 1, files)
        squares = Squares(sites)
        with model.layer(number):
            for start, stop in self._chunks():
                with listening(model, sites, squares.listen if start < first else _deaf):
                    self._move(number, current[""], following[""], start, stop)
            squares.forget()
            self.unreached += squares.unreached
            self.means |= squares.means(model.source.checkpoint)
            tensors = [stored.tensor for site in sites for stored in site.stored]
            for names in self._alike(tensors):
                with self._quantized(sites, self.streams[names[0]]):
                    for name in names:
                        self._move_held_out(number, current[name], following[name])
        for name, file in current.items():
            if name or not self.keep_states:
                file.remove()
        give_back_memory()
        return following

    def _alike(self, tensors: Collection[str]) -> list[list[str]]:
        """The streams, those together in which all `tensors` have the same weights."""
        found: dict[tuple[QuantSpec | None, ...], list[str]] = {}
        for name, specs in self.streams.items():
            found.setdefault(tuple(map(specs.get, tensors)), []).append(name)
        return list(found.values())

    def _move_held_out(self, number: int, current: StateFile, following: StateFile) -> None:
        for start, stop in chunks(0, self.windows.held_out, self.windows.ids.shape[1]):
            self._move(number, current, following, start, stop)

    def _move(
        self, number: int, current: StateFile, following: StateFile, start: int, stop: int
    ) -> None:
        call = self.model.call(number, stop - start)
        layer = self.model.module(self.model.layers[number])
        found = call.run(layer, current.read(start, stop).to(self.model.device))
        following.write(start, found)

    @contextmanager
    def _quantized(
        self, sites: tuple[Site, ...], specs: Mapping[str, QuantSpec | None]
    ) -> Iterator[None]:
        """Give a layer other weights while the block runs."""
        before: list[tuple[Site, StoredRows, torch.Tensor]] = []
        for site in sites:
            for stored in site.stored:
                spec = specs.get(stored.tensor)
                if spec is not None:
                    weight = site.read(self.model, stored).clone()
                    before.append((site, stored, weight))
                    site.write(self.model, stored, self._rounded(stored.tensor, weight, spec))
        try:
            yield
        finally:
            for site, stored, weight in before:
                site.write(self.model, stored, weight)

    def _rounded(self, name: str, weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
        found, _ = quantize_with_stats(
            weight, spec, shares=self._shares(name, len(weight), spec), threads=self.threads,
            name=name,
        )  # fmt: skip
        return dequantize_tensor(found)

    def _shares(self, name: str, rows: int, spec: QuantSpec) -> Shares | None:
        values = self.importance(name)
        if values is None:
            return None
        return column_shares(values, rows // len(values), spec.block_size, name)

    def importance(self, name: str) -> np.ndarray | None:
        """What errors of the columns of a tensor count for, `[matrices, cols]`; None for alike."""
        if self.weigh is None:
            return None
        given = self.means if isinstance(self.weigh, str) else self.weigh
        found = given.get(name)
        return None if found is None else np.atleast_2d(found)


def layer_bytes(model: LayeredModel, number: int) -> int:
    """What the weights of layer `number` take in float32; progress counts by it."""
    layer = model.module(model.layers[number])
    return 4 * sum(parameter.numel() for parameter in layer.parameters())


def _deaf(key: str, expert: int, x: torch.Tensor) -> None:
    """A listener to what is held out."""
