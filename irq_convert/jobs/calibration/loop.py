"""The loop over decoder layers: two streams of hidden states, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.contents import write_quantized
from irq_convert.checkpoint.files import sha256_file
from irq_convert.checkpoint.header import TensorInfo, read_header
from irq_convert.checkpoint.writer import ShardWriter, TensorSpec, build_header
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.solver.moments import full_precision
from irq_convert.core.spec import QuantSpec
from irq_convert.core.tensor_stats import TensorStats, decode_stats, encode_stats
from irq_convert.core.threads import torch_threads
from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.calibration.judge import Judgement, judge
from irq_convert.jobs.calibration.layer import LayerCalibrator, LayerOptions, LayerResult
from irq_convert.jobs.calibration.options import LoopOptions
from irq_convert.jobs.calibration.sites import find_sites
from irq_convert.jobs.calibration.states import StateFile, state_file
from irq_convert.jobs.calibration.text import Windows
from irq_convert.jobs.calibration.workspace import Workspace
from irq_convert.jobs.common.records import ShardRecord
from irq_convert.progress import Progress

STREAMS = ("source", "quantized", "plain")


@dataclass(frozen=True)
class LayerFile:
    """The packed weights of one layer in a file: `tensors` by name, what is stored of each."""

    name: str
    tensors: Mapping[str, Sequence[TensorSpec]]

    @property
    def specs(self) -> list[TensorSpec]:
        """All that the file holds."""
        return [spec for outputs in self.tensors.values() for spec in outputs]

    @cached_property
    def nbytes(self) -> int:
        """Its exact size."""
        head = len(build_header(self.specs, {"format": "pt"}))
        return head + sum(spec.nbytes for spec in self.specs)


def layer_files(
    model: LayeredModel, outputs: Mapping[str, Sequence[TensorSpec]]
) -> tuple[LayerFile, ...]:
    """The files that the layers of `model` make; `outputs`: what is stored of each tensor."""
    found = []
    for number in range(len(model.layers)):
        sites = find_sites(model, number, outputs)
        names = [stored.tensor for site in sites for stored in site.stored]
        tensors = {name: outputs[name] for name in names}
        found.append(LayerFile(f"layer-{number:05}.safetensors", tensors))
    return tuple(found)


@dataclass(frozen=True)
class Calibrated:
    """Weights that were calibrated, in the files of a workspace, with what is known of them.

    `infos`: where each stored part of a tensor lies, by the tensor's name.
    """

    infos: Mapping[str, tuple[TensorInfo, ...]]
    stats: Mapping[str, TensorStats]
    judgement: Judgement
    few: Mapping[str, int] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()


@dataclass
class Calibration:
    """One run of the loop over `model`, in `work`."""

    model: LayeredModel
    specs: Mapping[str, QuantSpec]
    windows: Windows
    choice: LoopOptions
    layers: tuple[LayerFile, ...]
    work: Workspace
    progress: Progress
    threads: int | None = None

    def run(self) -> Calibrated:
        """Calibrate every layer that is not finished, and judge the whole.

        Raises `IrqError` naming the layer for activations that overflow, or when a disk fails.
        """
        count = len(self.layers)
        self.progress.phase("calibrating", count, sum(each.nbytes for each in self.layers))
        done = self.work.done
        self.progress.resumed(len(done), sum(record.bytes for record in done))
        if done:
            self.progress.note(f"{len(done)} of {count} layers are calibrated already")
        self.model.read_order = self.model.plan_reading(len(done), passes=2)
        # Products are added up in another order by another number of threads.
        precise = full_precision()
        with torch.no_grad(), torch_threads(self.threads), precise, ExitStack() as files:
            current = self._begin(len(done), files)
            for number in range(len(done), count):
                following = self._open(number + 1, files, new=True)
                current = self._layer(number, current, following)
            judgement = self._judge(current)
        return collect(self.work.files, self.layers, self.work.done, judgement)

    @property
    def _layer_options(self) -> LayerOptions:
        windows, choice = self.windows, self.choice
        return LayerOptions(
            solver=choice.solver,
            correction=choice.correction,
            ridge=choice.ridge,
            refine=choice.refine,
            windows=len(windows.ids),
            calibrating=windows.calibrating,
            tokens=windows.ids.shape[1],
            threads=self.threads,
        )

    def _open(self, number: int, files: ExitStack, *, new: bool) -> dict[str, StateFile]:
        """The states before layer `number`, of all streams."""
        ids = self.windows.ids
        counts = (len(ids), len(ids), self.windows.held_out)
        return {
            stream: files.enter_context(
                state_file(
                    self._state_path(number, stream), windows, ids.shape[1], self._width, new=new
                )
            )
            for stream, windows in zip(STREAMS, counts, strict=True)
        }

    def _state_path(self, number: int, stream: str) -> Path:
        return self.work.states / f"{stream}-{number:05}"

    def _begin(self, number: int, files: ExitStack) -> dict[str, StateFile]:
        """States before layer `number`: made, or those that an earlier run has left."""
        ids, first = self.windows.ids, self.windows.calibrating
        with self.model.outside():
            tables = self._tables() if number == 0 else {}
            for start, stop in self._layer_options.chunks():
                states = self.model.begin(ids[start:stop])
                if not start:
                    self._width = states.shape[-1]
                    current = self._open(number, files, new=number == 0)
                if number == 0:
                    current["source"].write(start, states)
                    if tables:
                        with self.model.source.replaced(self.model.model, tables):
                            states = self.model.begin(ids[start:stop])
                    current["quantized"].write(start, states)
                    if start >= first:
                        current["plain"].write(start - first, states)
        return current

    def _tables(self) -> dict[str, torch.Tensor]:
        """Embeddings and heads that are quantized, as the artifact will have them.

        They are quantized without data. Called inside `model.outside()`.
        """
        return {
            name: dequantize_tensor(
                quantize_tensor(weight, self.specs[name], threads=self.threads, name=name)
            )
            for name, weight in self.model.tables().items()
            if name in self.specs
        }

    def _layer(
        self, number: int, current: dict[str, StateFile], following: dict[str, StateFile]
    ) -> dict[str, StateFile]:
        self.progress.stage(f"calibrating {self.model.layers[number]}")
        calibrator = LayerCalibrator(
            self.model, number, self.specs, self._layer_options, self.work.states
        )
        result = calibrator.run(current, following)
        file = self.layers[number]
        self._write(file, result)
        record = ShardRecord(
            file.name, file.nbytes, sha256_file(self.work.files / file.name), _results(result)
        )
        self.work.note(record)
        for states in current.values():
            states.remove()
        self.progress.advance(file.nbytes, finished=True)
        return following

    def _write(self, file: LayerFile, result: LayerResult) -> None:
        with ShardWriter(self.work.files / file.name, file.specs) as writer:
            for name in file.tensors:
                found, _ = result.tensors[name]
                write_quantized(writer, name, found.shape, 0, found)

    def _judge(self, current: Mapping[str, StateFile]) -> Judgement:
        self.progress.stage("judging by held-out windows")
        first = self.windows.calibrating
        offsets = {"source": first, "quantized": first, "plain": 0}
        streams = {name: (current[name], at) for name, at in offsets.items()}
        with self.model.outside():
            return judge(self.model, self.windows.ids[first:], streams, self._tables())


def collect(
    folder: Path, layers: Sequence[LayerFile], records: Sequence[ShardRecord], judgement: Judgement
) -> Calibrated:
    """What the finished `layers` in `folder` hold, by their `records`."""
    infos: dict[str, tuple[TensorInfo, ...]] = {}
    stats: dict[str, TensorStats] = {}
    few: dict[str, int] = {}
    unseen: list[str] = []
    for file, record in zip(layers, records, strict=True):
        found = read_header(folder / file.name).tensors if file.tensors else {}
        for name, outputs in file.tensors.items():
            infos[name] = tuple(found[spec.name] for spec in outputs)
        results: Mapping[str, Any] = record.results
        stats |= {name: decode_stats(each) for name, each in results["stats"].items()}
        few |= results["few"]
        unseen += results["unseen"]
    return Calibrated(infos, stats, judgement, few, tuple(unseen))


def _results(result: LayerResult) -> dict[str, Any]:
    stats = {name: encode_stats(found[1]) for name, found in result.tensors.items()}
    return {"stats": stats, "few": result.few, "unseen": result.unseen}
