"""One decoder layer: what its weights are given, and the codes that serve these inputs best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.importance import Shares, column_shares
from irq_convert.core.quantize import quantize_tensor, quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.solver.moments import corrections, factorize, pulled
from irq_convert.core.solver.options import SolverOptions
from irq_convert.core.solver.solve import MatrixSolver
from irq_convert.core.spec import QuantSpec
from irq_convert.core.tensor_stats import TensorStats
from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.calibration.experts import ExpertInputs
from irq_convert.jobs.calibration.memo import Memo
from irq_convert.jobs.calibration.moments import Moments
from irq_convert.jobs.calibration.sites import (
    SharedInputs,
    Site,
    StoredRows,
    find_sites,
    listening,
)
from irq_convert.jobs.calibration.states import StateFile, chunks, state_file
from irq_convert.jobs.common.memory import give_back_memory
from irq_convert.nn.recording import Listener


@dataclass(frozen=True)
class LayerOptions:
    """How a layer is calibrated.

    `correction`: how much of what the layers before got wrong is corrected for, 0 to 1; `ridge`, in
    mean diagonals of H, keeps that from following the text. `refine`: rounds of least squares in
    the search for scale and tau. `windows` from `calibrating` on are
    held out.
    """

    solver: SolverOptions
    correction: float
    ridge: float
    refine: int
    windows: int
    calibrating: int
    tokens: int
    threads: int | None = None

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
        """Windows `first .. last` in chunks that hold either calibrating or held-out ones."""
        last = self.windows if last is None else last
        for start, stop in ((first, min(last, self.calibrating)), (self.calibrating, last)):
            yield from chunks(max(first, start), stop, self.tokens)


@dataclass
class LayerResult:
    """What became of a layer: its tensors by their names in the files.

    `few`: by site, how many experts saw too few tokens to be taken alone; `unseen`: tensors whose
    weights no token reached.
    """

    tensors: dict[str, tuple[QuantizedTensor, TensorStats]] = field(default_factory=dict)
    few: dict[str, int] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)


class _Stop(Exception):
    """The inputs that were waited for have come."""


@dataclass
class LayerCalibrator:
    """Calibrates layer `number` of `model`; `specs` say how each tensor of the files is quantized.

    `folder` takes the inputs of the source's weights for as long as the layer is worked on.
    """

    model: LayeredModel
    number: int
    specs: Mapping[str, QuantSpec]
    options: LayerOptions
    folder: Path

    def __post_init__(self) -> None:
        self.sites = find_sites(self.model, self.number, self.specs)
        self._by_key = {site.key: site for site in self.sites}
        self._groups: list[list[str]] = []
        self._result = LayerResult()
        self._inputs: dict[str, StateFile] = {}

    def run(
        self, states: Mapping[str, StateFile], following: Mapping[str, StateFile]
    ) -> LayerResult:
        """Calibrate, and move the states of all streams on through the layer.

        Streams: "source", "quantized", and "plain", the held-out windows with data-free weights,
        where it is wanted.
        """
        with ExitStack() as files:
            with self.model.layer(self.number):
                self._run_source(states["source"], following["source"], files)
                if "plain" in states:
                    self._make_plain()
                    self._move_on(states["plain"], following["plain"], self.options.calibrating)
            with self.model.layer(self.number) as layer:
                self._memo = Memo(layer, self.model.layers[self.number], self.sites)
                for group in self._groups:
                    site = self._by_key[group[0]]
                    if site.stacked:
                        self._solve_stack(site, states["quantized"])
                    else:
                        self._solve_linears(group, states["quantized"])
                self._solve_unseen()
                self._move_on(states["quantized"], following["quantized"], memo=self._memo)
        for file in self._inputs.values():
            file.remove()
        return self._result

    def _through(self, states: torch.Tensor) -> torch.Tensor:
        call = self.model.call(self.number, len(states))
        layer = self.model.module(self.model.layers[self.number])
        return call.run(layer, states.to(self.model.device))

    def _move_on(
        self, states: StateFile, following: StateFile, first: int = 0, memo: Memo | None = None
    ) -> None:
        for start, stop in self.options.chunks(first):
            with memo.used(start) if memo else nullcontext():
                found = self._through(states.read(start - first, stop - first))
            following.write(start - first, found)
        following.flush()

    def _run_source(self, states: StateFile, following: StateFile, files: ExitStack) -> None:
        """Move the source's states on; learn which weights share inputs, and keep these."""
        opts = self.options
        for start, stop in opts.chunks():
            kept = start < opts.calibrating and opts.correction > 0
            heard = SharedInputs(self._groups, {site.key for site in self.sites if site.stacked})
            with listening(self.model, self.sites, heard.listen):
                following.write(start, self._through(states.read(start, stop)))
            for key, x in heard.inputs.items() if kept else ():
                self._keep_inputs(key, start, x, files)
        following.flush()

    def _keep_inputs(self, key: str, start: int, x: torch.Tensor, files: ExitStack) -> None:
        if key not in self._inputs:
            path = self.folder / f"inputs-{len(self._inputs)}"
            opened = state_file(
                path, self.options.calibrating, self.options.tokens, x.shape[-1], new=True
            )
            self._inputs[key] = files.enter_context(opened)
        self._inputs[key].write(start, x)

    def _make_plain(self) -> None:
        """Give the layer its data-free weights."""
        for site in self.sites:
            for stored in site.stored:
                weight = site.read(self.model, stored)
                spec = self.specs[stored.tensor]
                found = quantize_tensor(
                    weight, spec, threads=self.options.threads, name=stored.tensor
                )
                site.write(self.model, stored, dequantize_tensor(found))

    def _solve_linears(self, group: list[str], states: StateFile) -> None:
        leader = self._by_key[group[0]]
        source = self._inputs.get(leader.key)
        moments = Moments(leader.cols, source is not None, self.model.device)
        seen: list[torch.Tensor] = []

        def listen(key: str, expert: int, x: torch.Tensor) -> None:
            if key == leader.key:
                seen.append(x.reshape(-1, leader.cols))
                raise _Stop

        with listening(self.model, (leader,), listen):
            for start, stop in self.options.chunks(0, self.options.calibrating):
                seen.clear()
                with self._memo.used(start), suppress(_Stop):
                    self._through(states.read(start, stop))
                own = None if source is None else _flat(source, start, stop, seen[0])
                moments.add(seen[0], own)
        seen.clear()  # the last inputs: what follows needs the room
        own = None
        whole = moments.whole(leader.module)
        sites = [self._by_key[key] for key in group]
        weights = [site.read(self.model, site.stored[0]) for site in sites]
        targets = weights
        if moments.cross is not None:
            pulls = [pulled(weight, moments.cross) for weight in weights]
            moments.cross = None  # as large as H
            give_back_memory()
            targets = corrections(
                weights, pulls, whole, self.options.correction, self.options.ridge
            )
            del pulls
        shares = whole.diagonal().double().cpu().numpy()
        give_back_memory()
        factor = factorize(whole, self.options.solver.damping, leader.key)
        for site, weight, target in zip(sites, weights, targets, strict=True):
            (stored,) = site.stored
            spec = self.specs[stored.tensor]
            weighing = column_shares(shares, len(weight), spec.block_size, stored.tensor)
            solver = self._solver(stored, weight, weighing)
            solver.solve(0, target, whole, factor, self.options.solver)
            self._settle(site, stored, solver)
            self._memo.solved(site)

    def _solver(self, stored: StoredRows, weight: torch.Tensor, shares: Shares) -> MatrixSolver:
        spec, options = self.specs[stored.tensor], self.options
        spec = replace(spec, refine=spec.refine or options.refine)
        return MatrixSolver(weight, spec, shares, threads=options.threads, name=stored.tensor)

    def _settle(self, site: Site, stored: StoredRows, solver: MatrixSolver) -> None:
        found, stats = solver.result()
        self._result.tensors[stored.tensor] = found, stats
        site.write(self.model, stored, dequantize_tensor(found))

    def _solve_stack(self, site: Site, states: StateFile) -> None:
        def pass_over(listener: Listener) -> None:
            with listening(self.model, self._beside(site), listener):
                for start, stop in self.options.chunks(0, self.options.calibrating):
                    with self._memo.used(start):
                        self._through(states.read(start, stop))

        experts = ExpertInputs.count(site, pass_over, self.model.device)
        shares = {
            stored.tensor: column_shares(
                experts.importance(stored), stored.rows[0].stop - stored.rows[0].start,
                self.specs[stored.tensor].block_size, stored.tensor,
            )
            for stored in site.stored
        }  # fmt: skip
        solvers = {
            stored.tensor: self._solver(
                stored, site.read(self.model, stored), shares[stored.tensor]
            )
            for stored in site.stored
        }
        damping = self.options.solver.damping
        for expert, moments in experts.moments(pass_over):
            factor = factorize(moments, damping, site.key)
            for stored in site.stored:
                at = 0
                for rows in stored.rows:
                    count = rows.stop - rows.start
                    if rows.matrix == expert:
                        target = site.matrix(self.model, expert)[rows.start : rows.stop]
                        solvers[stored.tensor].solve(
                            at, target, moments, factor, self.options.solver
                        )
                    at += count
        for stored in site.stored:
            self._settle(site, stored, solvers[stored.tensor])
        self._memo.solved(site)
        if experts.few:
            self._result.few[site.key] = experts.few

    def _beside(self, site: Site) -> tuple[Site, ...]:
        """The sites of the same module, so that all its stacks are stood in for."""
        return tuple(each for each in self.sites if each.module == site.module)

    def _solve_unseen(self) -> None:
        """Weights that no token reached keep what the search without data gives."""
        seen = {key for group in self._groups for key in group}
        for site in self.sites:
            if site.key in seen:
                continue
            for stored in site.stored:
                weight, spec = site.read(self.model, stored), self.specs[stored.tensor]
                found = quantize_with_stats(
                    weight, spec, threads=self.options.threads, name=stored.tensor
                )
                self._result.tensors[stored.tensor] = found
                self._result.unseen.append(stored.tensor)
                site.write(self.model, stored, dequantize_tensor(found[0]))


def _flat(inputs: StateFile, start: int, stop: int, like: torch.Tensor) -> torch.Tensor:
    """Kept inputs of some windows, `[tokens, cols]`, where and as `like` is."""
    return inputs.read(start, stop).view(-1, like.shape[-1]).to(like.device)
