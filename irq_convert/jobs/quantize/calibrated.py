"""Weights fitted to a text before shards are written: the loop's surroundings in a conversion."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from irq_convert.errors import UsageError
from irq_convert.hf.layer_calls import NotLayered
from irq_convert.hf.layered import LayeredModel, open_layered
from irq_convert.hf.limits import fit_window
from irq_convert.jobs.calibration.judge import Judgement
from irq_convert.jobs.calibration.loop import (
    Calibrated,
    Calibration,
    LayerFile,
    collect,
    layer_files,
)
from irq_convert.jobs.calibration.options import WINDOW, CalibrationOptions, LoopOptions
from irq_convert.jobs.calibration.text import Windows
from irq_convert.jobs.calibration.workspace import Workspace, calibration_folder, workspace
from irq_convert.jobs.common.records import read_run, read_shard_record
from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.jobs.quantize.job import quantize_identity
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import QuantizePlan
from irq_convert.jobs.quantize.windows import read_windows
from irq_convert.progress import Progress


@dataclass(frozen=True)
class CalibrationPlan:
    """What is known before a layer is run: the model, the windows, and what each layer makes.

    Only the first of several processes has windows: it calibrates, and tells the others.
    """

    options: CalibrationOptions
    model: LayeredModel
    windows: Windows | None
    layers: tuple[LayerFile, ...]

    def describe(self) -> dict[str, Any]:
        """What tells this calibration from another, besides the options."""
        assert self.windows is not None
        return {f"calibration_{name}": value for name, value in self.windows.describe().items()}


def plan_calibration(
    plan: QuantizePlan,
    options: QuantizeOptions,
    progress: Progress,
    *,
    first: bool = True,
    sample: bool = True,
) -> CalibrationPlan | None:
    """Read the text, in the `first` process, and lay out the layers; None without a calibration.

    Without `sample` the windows of a text that the source would write are empty.

    Raises `UsageError` for a model that cannot be run layer by layer, a window longer than its
    context or tokens beyond its vocabulary, and as reading the text does.
    """
    chosen = options.calibrate
    if chosen is None:
        return None
    checkpoint = plan.checkpoint
    try:
        model = open_layered(checkpoint, options.device)
    except NotLayered as error:
        raise _refused(plan, str(error)) from error
    outputs = {tensor.name: tensor.outputs for tensor in plan.quantized}
    layers = layer_files(model, outputs)
    if not first:
        return CalibrationPlan(chosen, model, None, layers)
    window = fit_window(model.model.config, chosen.window, WINDOW, "--calibration-window")
    chosen = replace(chosen, window=window)
    no_stream = (
        "--calibrate self needs the whole model, which --stream never has on the disk: leave "
        "out --stream, or give a text"
    )
    windows = read_windows(
        plan, options, chosen, model, progress, no_stream=no_stream, sample=sample
    )
    return CalibrationPlan(chosen, model, windows, layers)


def _refused(plan: QuantizePlan, why: str) -> UsageError:
    return UsageError(
        f"{plan.checkpoint.folder}: cannot be calibrated layer by layer: {why}; leave out "
        "--calibrate, or give --importance"
    )


@dataclass(frozen=True)
class Fitted:
    """Calibrated weights, and the manifest's `calibration`."""

    weights: Calibrated
    record: Mapping[str, Any]

    @property
    def kept(self) -> Calibrated | None:
        """The weights, where they are better than those made without data."""
        return self.weights if self.weights.judgement.better else None


@contextmanager
def calibrated_weights(
    plan: QuantizePlan,
    calibration: CalibrationPlan | None,
    model: str,
    out: Path,
    options: QuantizeOptions,
    processes: RunProcesses,
    progress: Progress,
    *,
    place: int = 0,
) -> Iterator[Fitted | None]:
    """Calibrate in the first process, or take what an earlier run has finished; lend the result.

    None where nothing is to be calibrated. The files are there until the block ends; what is
    finished outlives a failure, as `options.resume` says. `place` tells calibrations of one run
    from each other.
    """
    if calibration is None:
        yield None
        return
    layers = calibration.layers
    if not processes.ranks.first:
        told = json.loads(processes.take(f"calibrated-{place}"))
        record = told["record"]
        judgement = Judgement(**{each.name: record[each.name] for each in fields(Judgement)})
        root = calibration_folder(out, told["number"])
        yield Fitted(_from_folder(root, layers, judgement), record)
        return
    # The others wait, so their processors are free.
    threads = options.threads and options.threads * processes.ranks.beside
    with ExitStack() as folders:
        tried: list[Tried] = []
        choices = calibration.options.choices
        for number, choice in enumerate(choices, start=place * len(choices)):
            of_data = calibration.describe() | {"calibration_choice": choice.to_dict()}
            identity = quantize_identity(plan, model, options, of_data)
            work = folders.enter_context(
                workspace(out, identity, layers, options.resume, progress, number)
            )
            tried.append(
                Tried(number, choice, _run(plan, calibration, choice, work, threads, progress))
            )
        best = min(tried, key=lambda each: each.found.judgement.kl)
        record = _record(calibration, tried, best)
        told = {"number": best.number, "record": record}
        processes.put(f"calibrated-{place}", json.dumps(told).encode())
        for line in _remarks(best.found):
            progress.note(line)
        yield Fitted(best.found, record)


@dataclass(frozen=True)
class Tried:
    """A choice and what has come of it."""

    number: int
    choice: LoopOptions
    found: Calibrated


def _run(
    plan: QuantizePlan,
    calibration: CalibrationPlan,
    choice: LoopOptions,
    work: Workspace,
    threads: int | None,
    progress: Progress,
) -> Calibrated:
    assert calibration.windows is not None
    specs = {tensor.name: tensor.spec for tensor in plan.quantized if tensor.spec}
    run = Calibration(
        calibration.model,
        specs,
        calibration.windows,
        choice,
        calibration.layers,
        work,
        progress,
        threads,
    )
    try:
        return run.run()
    except NotLayered as error:
        raise _refused(plan, str(error)) from error


def _from_folder(root: Path, layers: tuple[LayerFile, ...], judgement: Judgement) -> Calibrated:
    """What the first process has made, on a disk that all share."""
    run = read_run(root / "records")
    records = [run and read_shard_record(root / "records", run[0], each.name) for each in layers]
    whole = [record for record in records if record]
    if len(whole) != len(layers):
        raise UsageError(
            f"{root}: not that of this run on this host: all hosts must share the folder that "
            "holds the output"
        )
    return collect(root / "files", layers, whole, judgement)


def _remarks(found: Calibrated) -> Iterator[str]:
    if not found.judgement.better:
        yield (
            f"calibrating has not helped: KL {found.judgement.kl:.4f} on held-out windows, "
            f"{found.judgement.plain:.4f} without data, which is kept: give more text, or text "
            "like the model's"
        )
    few = sum(found.few.values())
    if few:
        yield (
            f"{few} matrices of experts saw few tokens and lean on their layer's: more "
            "--calibration-tokens help"
        )
    if found.unseen:
        yield f"{len(found.unseen)} tensors were reached by no token and are quantized without data"


def _record(calibration: CalibrationPlan, tried: Sequence[Tried], best: Tried) -> dict[str, Any]:
    """The manifest's `calibration`."""
    assert calibration.windows is not None
    found = best.found
    others = [
        {
            "correction": each.choice.correction,
            "damping": each.choice.damping,
            "kl": each.found.judgement.kl,
        }
        for each in tried
    ]
    choice = {key: value for key, value in best.choice.to_dict().items() if key != "sweep"}
    return {
        **calibration.windows.describe(),
        "seed": calibration.options.seed,
        **choice,
        **found.judgement.to_dict(),
        "kept": "calibrated" if found.judgement.better else "plain",
        "few_tokens": sum(found.few.values()),
        "unseen": len(found.unseen),
        **({"tried": others} if len(others) > 1 else {}),
    }
