"""What a size is chosen from: how sensitive every weight is, and what its choices cost in bytes."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_convert.artifact.sensitivity import write_sensitivity
from irq_convert.artifact.source_identity import source_identity
from irq_convert.checkpoint.layout import LOCK_NAME
from irq_convert.checkpoint.lock import Held, take_folder
from irq_convert.checkpoint.system import os_errors
from irq_convert.core.codebook import FAMILIES
from irq_convert.core.objective import ZeroPoint
from irq_convert.errors import UsageError
from irq_convert.hf.layer_calls import NotLayered
from irq_convert.hf.layered import LayeredModel, open_layered
from irq_convert.hf.limits import fit_window
from irq_convert.jobs.calibration.options import SELF, WINDOW, CalibrationOptions
from irq_convert.jobs.calibration.sites import find_sites
from irq_convert.jobs.calibration.text import Windows
from irq_convert.jobs.common.expressions import last_match
from irq_convert.jobs.quantize.importance import Weighing
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import QuantizePlan
from irq_convert.jobs.quantize.sensitivity_file import SensitivityFile
from irq_convert.jobs.quantize.target_bytes import bytes_by_choice, target_of, whole_bytes
from irq_convert.jobs.quantize.target_reach import refuse_unreachable
from irq_convert.jobs.quantize.windows import read_windows
from irq_convert.jobs.sizing.choices import BLOCKS, DENSE, Choice, quantized_choices
from irq_convert.jobs.sizing.ends import Ends
from irq_convert.jobs.sizing.measure import Subject, measure_sensitivity
from irq_convert.jobs.sizing.mix import Market
from irq_convert.jobs.sizing.rules import make_groups
from irq_convert.progress import Progress

MEASURED = "measured"
"""Errors are weighed by the importance that the same pass measures."""
STATE_NAMES = ("source-", "stream-", "gradients")
"""What files of hidden states are called."""


@dataclass(frozen=True)
class Target:
    """What a size is chosen from: a plan, the model that runs, and everything that was measured."""

    plan: QuantizePlan
    options: QuantizeOptions
    market: Market
    subject: Subject
    outside: int

    @property
    def room(self) -> int:
        """Bytes that the weights to choose for may take, by the target."""
        target = target_of(self.options)
        if target.bits is not None:
            return int(target.bits * self.weights / 8)
        assert target.size is not None
        return target.size - self.outside

    @property
    def weights(self) -> int:
        """How many weights there is a choice for."""
        chosen = set(self.subject.tensors)
        return sum(t.info.numel for t in self.plan.quantized if t.name in chosen)


def plan_target(
    plan: QuantizePlan,
    model: str,
    out: Path,
    options: QuantizeOptions,
    weighing: Weighing | None,
    folder: Path,
    progress: Progress,
    *,
    keep: bool = True,
) -> Target:
    """Measure how sensitive every weight is, or read what an earlier run has measured.

    It is kept in a file; without `keep` only in one that the user named.
    """
    asked = target_of(options)
    with layers_or_refused(plan):
        layered = open_layered(plan.checkpoint, options.device)
        every = {tensor.name: tensor for tensor in plan.quantized}
        ends = Ends.of(layered, plan.tables)
        names = {*_names_in_layers(layered, every), *ends.first, *ends.last}
        quantized = {name: tensor for name, tensor in every.items() if name in names}
        choices = _choices(options)
        groups = make_groups(
            list(quantized),
            [stack.tensors for stack in layered.source.stacks.values()],
            (*choices, DENSE),
            asked,
            _fixed(options, list(quantized)),
        )
        outside = whole_bytes(plan, options) - sum(tensor.nbytes for tensor in quantized.values())
        nbytes = bytes_by_choice(options, quantized)
        refuse_unreachable(plan, options, groups, outside, nbytes)
        windows = _windows(plan, options, layered, progress)
        weigh: Any = None if weighing is None else weighing.values
        weigh = MEASURED if options.calibrate is not None else weigh
        subject = Subject(
            layered, tuple(quantized), windows, options.spec, weigh, asked.seed, options.threads
        )
        settings = _settings(options, weighing, windows, names & plan.tables)
        source = source_identity(plan.checkpoint, model)
        file = SensitivityFile.of(asked.file, out, settings, source, choices)
        found = file.read(quantized, progress)
        if found is None:
            found = measure_sensitivity(subject, choices, settings, source, folder, progress)
            if keep or file.named:
                write_sensitivity(file.path, found)
                progress.note(f"sensitivities are kept in {file.path}, for other sizes")
    return Target(plan, options, Market(groups, found, nbytes), subject, outside)


def _names_in_layers(model: LayeredModel, tensors: Collection[str]) -> Iterator[str]:
    for number in range(len(model.layers)):
        for site in find_sites(model, number, tensors):
            yield from (stored.tensor for stored in site.stored)


def _choices(options: QuantizeOptions) -> tuple[Choice, ...]:
    asked = target_of(options)
    families = asked.families or tuple(FAMILIES)
    if options.spec.zero_point == ZeroPoint.INTEGER:
        families = tuple(name for name in families if FAMILIES[name].uniform)
    return quantized_choices(families, asked.blocks or BLOCKS)


def _fixed(options: QuantizeOptions, names: list[str]) -> dict[str, int]:
    """Bits that --bits-for gives."""
    found = {name: last_match(options.bits_for, name) for name in names}
    return {name: bits for name, bits in found.items() if bits is not None}


def _settings(
    options: QuantizeOptions,
    weighing: Weighing | None,
    windows: Windows,
    tables: Collection[str],
) -> dict[str, Any]:
    """What a file of sensitivities holds for."""
    weighed = MEASURED if options.calibrate is not None else None
    if weighing is not None:
        weighed = weighing.record["sha256"]
    return {
        "objective": str(options.spec.objective),
        "refine": options.spec.refine,
        "zero_point": str(options.spec.zero_point),
        "weighed": weighed,
        **windows.describe(),
        "seed": target_of(options).seed,
        **({"tables": sorted(tables)} if tables else {}),
    }


def _windows(
    plan: QuantizePlan, options: QuantizeOptions, model: LayeredModel, progress: Progress
) -> Windows:
    """The text that damage is measured on: that of the target, of the calibration, or sampled."""
    asked, calibrate = target_of(options), options.calibrate
    text = asked.text or (calibrate.text if calibrate is not None else SELF)
    most = min(WINDOW, asked.tokens // 2)
    window = fit_window(model.model.config, asked.window, most, "window")
    chosen = CalibrationOptions(
        text, tokens=asked.tokens, window=window, seed=asked.seed, held_out=asked.held_out
    )
    no_stream = (
        "a target without a text samples one from the whole model, which --stream never has on the "
        "disk: give --target-text, or leave out --stream"
    )
    return read_windows(plan, options, chosen, model, progress, no_stream=no_stream)


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` for hidden states, gone afterwards, with parents that were not there.

    What a killed run has left there is removed first; `UsageError` where it holds anything else, or
    another run works in it.
    """
    real = out.resolve()
    folder, held, mine = real.with_name(f"{real.name}.states"), Held(), False
    new = [parent for parent in folder.parents if not parent.exists()]
    try:
        with os_errors("create it", folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        take_folder(folder, held)
        with os_errors("clear it", folder):
            left = [path for path in folder.iterdir() if path.name != LOCK_NAME]
            if not all(path.name.startswith(STATE_NAMES) for path in left):
                raise UsageError(f"{folder}: hidden states would lie there; remove it")
            for path in left:
                path.unlink()
        mine = True
        yield folder
    finally:
        if mine:
            shutil.rmtree(folder, ignore_errors=True)
        held.release()
        for parent in new:
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def layers_or_refused(plan: QuantizePlan) -> Iterator[None]:
    """Say in one line that a model cannot be measured, where the block finds it cannot be run."""
    try:
        yield
    except NotLayered as error:
        raise UsageError(
            f"{plan.checkpoint.folder}: cannot be run layer by layer, so its weights cannot be "
            f"measured: {error}; leave out the target, and use --bits and --bits-for"
        ) from error
