"""Starts by a text: layer by layer, each adapter given what reaches it once those before are there.

Two streams of hidden states run side by side, as in a calibration: those x of the source, and those
z of the artifact with the adapters that are solved. An adapter takes from z to what the source
makes of x: with `H = sum z z^T` and `C = sum (x - z) z^T` it starts from the error of W^ to

    W* = W + c W C (H + ridge I)^-1,

which is what W would have to be to undo the errors that no adapter before it could take away.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from irq_convert.core.error_start import LowRank
from irq_convert.core.solver.moments import corrections, full_precision, pulled
from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.calibration.experts import ExpertInputs
from irq_convert.jobs.calibration.memo import Memo
from irq_convert.jobs.calibration.moments import Moments
from irq_convert.jobs.calibration.options import CORRECTION
from irq_convert.jobs.calibration.sites import (
    SharedInputs,
    Site,
    StoredRows,
    find_sites,
    listening,
)
from irq_convert.jobs.calibration.states import StateFile, chunks, state_file
from irq_convert.jobs.finetune.start_layers import AdaptedLayer, Weights
from irq_convert.nn.recording import Listener
from irq_convert.progress import Progress

RIDGE = 0.05
"""Holds the correction back, in mean diagonals of H, as `CalibrationOptions` has it."""


class _Stop(Exception):
    """The inputs that were waited for have come."""


@dataclass
class TextStart:
    """One pass over `ids`, int64 `[windows, tokens]`, that solves `layers`, by tensor.

    Hidden states wait in files of a folder of its own in `scratch`, None for the system's.
    """

    model: LayeredModel
    weights: Weights
    layers: Mapping[str, AdaptedLayer]
    ids: torch.Tensor
    progress: Progress
    scratch: Path | None = None
    correction: float = CORRECTION
    ridge: float = RIDGE
    found: dict[str, LowRank] = field(default_factory=dict, init=False)

    def run(self) -> dict[str, LowRank]:
        """Set the adapters that the text reaches, and return what was found, by tensor.

        Raises `NotLayered` for a class that cannot be run layer by layer, `IrqError` naming the
        layer for activations that overflow, or when the disk refuses.
        """
        count = len(self.model.layers)
        self.progress.phase("starting adapters", count, count)
        self.model.read_order = self.model.plan_reading(0, passes=2, finish=False)
        with (
            torch.no_grad(),
            full_precision(),
            tempfile.TemporaryDirectory(dir=self.scratch) as folder,
            ExitStack() as files,
        ):
            streams = self._begin(Path(folder), files)
            for number in range(count):
                _Layer(self, number, *streams, Path(folder)).run()
                self.progress.advance(1, finished=1)
        return self.found

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Windows that a layer is run on at once."""
        return chunks(0, *self.ids.shape)

    def _begin(self, folder: Path, files: ExitStack) -> tuple[StateFile, StateFile]:
        """States before the first layer, of both streams; they stay in their files."""
        streams: list[StateFile] = []
        with self.model.outside():
            packed = self.weights.names & self.model.tables().keys()
            tables = {name: self.weights.quantized(name) for name in packed}
            for start, stop in self.chunks():
                states = self.model.begin(self.ids[start:stop])
                if not streams:
                    windows, tokens, width = len(self.ids), *states.shape[1:]
                    streams = [
                        files.enter_context(
                            state_file(folder / name, windows, tokens, width, new=True)
                        )
                        for name in ("source", "adapted")
                    ]
                streams[0].write(start, states)
                if tables:
                    with self.model.source.replaced(self.model.model, tables):
                        states = self.model.begin(self.ids[start:stop])
                streams[1].write(start, states)
        source, adapted = streams
        return source, adapted


class _Layer:
    """Decoder layer `number`: its adapters solved, both streams moved on through it."""

    def __init__(
        self, run: TextStart, number: int, source: StateFile, adapted: StateFile, folder: Path
    ) -> None:
        self._run, self._model, self._number = run, run.model, number
        self._source, self._adapted, self._folder = source, adapted, folder
        self._sites = find_sites(run.model, number, run.weights.names)
        self._by_key = {site.key: site for site in self._sites}
        self._groups: list[list[str]] = []
        self._inputs: dict[str, StateFile] = {}

    def run(self) -> None:
        with ExitStack() as files:
            with self._model.layer(self._number):
                self._run_source(files)
            with self._model.layer(self._number) as layer:
                name = self._model.layers[self._number]
                self._memo = Memo(layer, name, self._sites)
                for group in self._groups:
                    if self._by_key[group[0]].stacked:
                        self._solve_stack(self._by_key[group[0]])
                    else:
                        self._solve_linears(group)
                for start, stop in self._run.chunks():
                    with self._memo.used(start):
                        self._adapted.write(start, self._through(self._adapted, start, stop))
        for file in self._inputs.values():
            file.remove()

    def _through(self, states: StateFile, start: int, stop: int) -> torch.Tensor:
        layer = self._model.module(self._model.layers[self._number])
        given = states.read(start, stop).to(self._model.device)
        return self._model.call(self._number, stop - start).run(layer, given)

    def _run_source(self, files: ExitStack) -> None:
        """Move the source on; learn which weights share inputs, and keep these for adapters."""
        stacked = {site.key for site in self._sites if site.stacked}
        for start, stop in self._run.chunks():
            heard = SharedInputs(self._groups, stacked)
            with listening(self._model, self._sites, heard.listen):
                self._source.write(start, self._through(self._source, start, stop))
            for group in self._groups:
                if group[0] in heard.inputs and self._wanted(group):
                    self._keep(group[0], start, heard.inputs[group[0]], files)

    def _wanted(self, group: list[str]) -> bool:
        """Whether one of the weights in `group` has an adapter."""
        stored = (each.tensor for key in group for each in self._by_key[key].stored)
        return any(tensor in self._run.layers for tensor in stored)

    def _keep(self, key: str, start: int, x: torch.Tensor, files: ExitStack) -> None:
        if key not in self._inputs:
            path = self._folder / f"inputs-{len(self._inputs)}"
            windows, tokens = self._run.ids.shape
            opened = state_file(path, windows, tokens, x.shape[-1], new=True)
            self._inputs[key] = files.enter_context(opened)
        self._inputs[key].write(start, x)

    def _solve_linears(self, group: list[str]) -> None:
        sites = [self._by_key[key] for key in group]
        if self._wanted(group):
            moments = self._moments(sites[0])
            h = moments.whole(sites[0].module)
            wanted = [site.read(self._model, site.stored[0]) for site in sites]
            assert moments.cross is not None
            pulls = [pulled(weight, moments.cross) for weight in wanted]
            moments.cross = None  # as large as H
            wanted = corrections(wanted, pulls, h, self._run.correction, self._run.ridge)
            h /= moments.tokens
            for site, weight in zip(sites, wanted, strict=True):
                self._settle(site, site.stored[0], weight, h)
        else:
            for site in sites:
                self._settle(site, site.stored[0], None, None)
        for site in sites:
            self._memo.solved(site)

    def _moments(self, leader: Site) -> Moments:
        """H and C of what the weights that share inputs with `leader` are given."""
        kept = self._inputs[leader.key]
        moments = Moments(leader.cols, True, self._model.device)
        seen: list[torch.Tensor] = []

        def listen(key: str, expert: int, x: torch.Tensor) -> None:
            seen.append(x.reshape(-1, leader.cols))
            raise _Stop

        with listening(self._model, (leader,), listen):
            for start, stop in self._run.chunks():
                seen.clear()
                with self._memo.used(start), suppress(_Stop):
                    self._through(self._adapted, start, stop)
                source = kept.read(start, stop).view(-1, leader.cols)
                moments.add(seen[0], source.to(seen[0].device))
        return moments

    def _settle(
        self, site: Site, stored: StoredRows, wanted: torch.Tensor | None, h: torch.Tensor | None
    ) -> None:
        """Give the layer what the artifact has, and where one is `wanted` the adapter's product."""
        run, weight = self._run, self._run.weights.quantized(stored.tensor)
        adapted = run.layers.get(stored.tensor)
        if adapted is not None and wanted is not None and h is not None:
            found = adapted.start(wanted - weight, h)
            run.found[stored.tensor] = found
            weight += found.product(adapted.block_size, site.cols)
        site.write(self._model, stored, weight)

    def _solve_stack(self, site: Site) -> None:
        """Experts: those that are layers of their own may have adapters, by their own tokens."""
        beside = tuple(each for each in self._sites if each.module == site.module)

        def pass_over(listener: Listener) -> None:
            with listening(self._model, beside, listener):
                for start, stop in self._run.chunks():
                    with self._memo.used(start):
                        self._through(self._adapted, start, stop)

        left = {each.tensor: each for each in site.stored}
        if self._wanted([site.key]):
            experts = ExpertInputs.count(site, pass_over, self._model.device)
            for expert, h in experts.moments(pass_over):
                own = [each for each in site.stored if each.rows[0].matrix == expert]
                for stored in own:
                    weight = site.read(self._model, left.pop(stored.tensor))
                    self._settle(site, stored, weight, h)
        for stored in left.values():
            self._settle(site, stored, None, None)
        self._memo.solved(site)
