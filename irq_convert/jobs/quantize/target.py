"""A size that is asked for: from the plan that keeps every weight alike to that of the best mix."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from irq_convert.artifact.manifest import describe_source
from irq_convert.artifact.sensitivity import Sensitivity, write_sensitivity
from irq_convert.checkpoint.system import format_bytes, os_errors
from irq_convert.core.codebook import FAMILIES
from irq_convert.core.objective import ZeroPoint
from irq_convert.core.spec import QuantSpec
from irq_convert.core.threads import torch_threads
from irq_convert.errors import UsageError
from irq_convert.hf.layered import LayeredModel, NotLayered, open_layered
from irq_convert.jobs.calibration.options import SELF, CalibrationOptions
from irq_convert.jobs.calibration.sampled import sample_tokens
from irq_convert.jobs.calibration.sites import find_sites
from irq_convert.jobs.calibration.source import (
    check_vocabulary,
    longest_context,
    source_tokenizer,
)
from irq_convert.jobs.calibration.text import Windows, choose_windows, tokenize_source
from irq_convert.jobs.common.metrics import MeanEstimate
from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.jobs.quantize.importance import Weighing
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import QuantizePlan, TensorPlan, replan
from irq_convert.jobs.quantize.sensitivity_file import SensitivityFile
from irq_convert.jobs.sizing.choices import BLOCKS, DENSE, Choice, quantized_choices
from irq_convert.jobs.sizing.measure import Subject, compare, measure_sensitivity
from irq_convert.jobs.sizing.mix import Market, Mix
from irq_convert.jobs.sizing.options import TargetOptions
from irq_convert.jobs.sizing.rules import Group, make_groups
from irq_convert.progress import Progress

MEASURED = "measured"
"""Errors are weighed by the importance that the same pass measures."""


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
        target = _target(self.options)
        if target.bits is not None:
            return int(target.bits * self.weights / 8)
        assert target.size is not None
        return target.size - self.outside

    @property
    def weights(self) -> int:
        """How many weights there is a choice for."""
        return sum(t.info.numel for t in self.plan.quantized if t.name in set(self.subject.tensors))


@dataclass(frozen=True)
class Sized:
    """The plan of the choice, and the manifest's `target`."""

    plan: QuantizePlan
    record: Mapping[str, Any] | None


def reach_target(
    plan: QuantizePlan,
    model: str,
    out: Path,
    options: QuantizeOptions,
    weighing: Weighing | None,
    processes: RunProcesses,
    progress: Progress,
) -> Sized:
    """The plan that `options.target` asks for, chosen by the first process; `plan` without one.

    Raises `UsageError` for a size that no mix reaches, rules that contradict each other, a model
    that cannot be run layer by layer, and as reading the text does; `IrqError` as the passes do.
    """
    if options.target is None:
        return Sized(plan, None)
    if not processes.ranks.first:
        told = json.loads(processes.take("target"))
        choices = {name: Choice.parse(text) for name, text in told["choices"].items()}
        return Sized(replan(plan, _specs(choices, options)), told["record"])
    with scratch_folder(out) as folder:
        target = plan_target(plan, model, out, options, weighing, folder, progress)
        mix, uniform = choose(target)
        seen = _compared(target, mix, uniform, folder, progress)
    kept = "mix" if uniform is None or seen["mix"].value <= seen["uniform"].value else "uniform"
    taken = mix if kept == "mix" or uniform is None else uniform
    if kept == "uniform":
        progress.note(
            f"{_word(uniform)} for all is better than the mix on held-out windows (KL "
            f"{seen['uniform'].value:.4f} against {seen['mix'].value:.4f}), and is kept"
        )
    if plan.tables:
        progress.note(
            f"embeddings and heads are {options.spec.codebook} whatever the mix is, or as "
            "--bits-for says, and its KL leaves them out"
        )
    record = _record(target, mix, uniform, seen, kept)
    told = {name: str(choice) for name, choice in taken.choices.items()}
    processes.put("target", json.dumps({"choices": told, "record": record}).encode())
    return Sized(replan(plan, _specs(taken.choices, options)), record)


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
    asked = _target(options)
    try:
        layered = open_layered(plan.checkpoint, options.device)
        every = {n for k in range(len(layered.layers)) for n in _names(layered, k, plan)}
        quantized = {t.name: t for t in plan.quantized if t.name in every}
        choices = _choices(options)
        groups = make_groups(
            list(quantized),
            [stack.tensors for stack in layered.source.stacks.values()],
            (*choices, DENSE),
            asked,
            _fixed(options, list(quantized)),
        )
        windows = _windows(plan, options, layered, progress)
        weigh: Any = None if weighing is None else weighing.values
        weigh = MEASURED if options.calibrate is not None else weigh
        subject = Subject(
            layered, tuple(quantized), windows, options.spec, weigh, asked.seed, options.threads
        )
        settings = _settings(options, weighing, windows)
        source = describe_source(plan.checkpoint, model)
        file = SensitivityFile.of(asked.file, out, settings, source, choices)
        found = file.read(quantized, progress)
        if found is None:
            found = measure_sensitivity(subject, choices, settings, source, folder, progress)
            if keep or file.named:
                write_sensitivity(file.path, found)
                progress.note(f"sensitivities are kept in {file.path}, for other sizes")
    except NotLayered as error:
        raise UsageError(
            f"{plan.checkpoint.folder}: cannot be run layer by layer, so its weights cannot be "
            f"measured: {error}; leave out the target, and use --bits and --bits-for"
        ) from error
    market = _market(plan, options, groups, quantized, found)
    taken = sum(tensor.nbytes for tensor in quantized.values())
    return Target(plan, options, market, subject, plan.bytes_at_most - taken)


@dataclass(frozen=True)
class Point:
    """A mix that could be asked for: bytes of the artifact, bits of a weight, the KL expected."""

    size: int
    bits: float
    expected: float


def target_frontier(
    plan: QuantizePlan,
    model: str,
    out: Path,
    options: QuantizeOptions,
    weighing: Weighing | None,
    progress: Progress,
) -> tuple[QuantizePlan, tuple[Point, ...]]:
    """The plan of the best mix, which nothing has judged yet, and what other sizes would give.

    Raises as `reach_target`.
    """
    with scratch_folder(out) as folder:
        target = plan_target(plan, model, out, options, weighing, folder, progress, keep=False)
    mix = _fitted(target, uniform=False)
    points = tuple(
        Point(nbytes + target.outside, 8 * nbytes / target.weights, expected)
        for nbytes, expected in target.market.frontier()
    )
    return replan(plan, _specs(mix.choices, options)), points


def _market(
    plan: QuantizePlan,
    options: QuantizeOptions,
    groups: tuple[Group, ...],
    quantized: Mapping[str, TensorPlan],
    found: Sensitivity,
) -> Market:
    known: dict[tuple[str, Choice], int] = {}

    def nbytes(name: str, choice: Choice) -> int:
        key = name, choice
        if key not in known:
            known[key] = replace(quantized[name], spec=choice.spec(options.spec)).nbytes
        return known[key]

    return Market(groups, found, nbytes)


def choose(target: Target) -> tuple[Mix, Mix | None]:
    """The best mix that fits with everything around it, and the best uniform choice that does.

    Raises `UsageError` naming the smallest and largest that can be reached.
    """
    return _fitted(target, uniform=False), _fitted_uniform(target)


def _fitted(target: Target, *, uniform: bool) -> Mix:
    """The mix whose whole artifact fits: headers and configuration change with the choice."""
    asked, room = _target(target.options), target.room
    pick = target.market.best_uniform if uniform else target.market.best
    for _ in range(16):
        found = pick(room)
        if found is None:
            raise _unreachable(target)
        if asked.size is None:
            return found
        plan = replan(target.plan, _specs(found.choices, target.options))
        over = plan.bytes_at_most - asked.size
        if over <= 0:
            return found
        room = min(room, found.nbytes) - over
    raise _unreachable(target)


def _fitted_uniform(target: Target) -> Mix | None:
    try:
        return _fitted(target, uniform=True)
    except UsageError:
        return None


def _unreachable(target: Target) -> UsageError:
    least, most = target.market.extent
    asked = _target(target.options)
    if asked.bits is not None:
        low, high = (8 * nbytes / target.weights for nbytes in (least, most))
        return UsageError(
            f"--target-bits {asked.bits:g}: the choices reach from {low:.4f} to {high:.4f} bits"
        )
    assert asked.size is not None
    low, high = least + target.outside, most + target.outside
    return UsageError(
        f"--target-size {format_bytes(asked.size)}: the choices reach from {format_bytes(low)} to "
        f"{format_bytes(high)}, and {format_bytes(target.outside)} of it are not quantized"
    )


def _compared(
    target: Target, mix: Mix, uniform: Mix | None, folder: Path, progress: Progress
) -> dict[str, MeanEstimate]:
    """KL on held-out windows of the mix, and of the uniform choice where there is one."""
    candidates = {"mix": mix} if uniform is None else {"mix": mix, "uniform": uniform}
    specs = {
        name: _specs(candidate.choices, target.options) for name, candidate in candidates.items()
    }
    if uniform is not None and mix.choices == uniform.choices:
        del specs["uniform"]
    found = compare(target.subject, specs, folder, progress)
    if uniform is not None:
        found.setdefault("uniform", found["mix"])
    return found


def _record(
    target: Target,
    mix: Mix,
    uniform: Mix | None,
    seen: Mapping[str, MeanEstimate],
    kept: str,
) -> dict[str, Any]:
    """The manifest's `target`."""
    asked, windows = _target(target.options), target.subject.windows
    other = None
    if uniform is not None:
        kl = seen["uniform"]
        other = {"choice": _word(uniform), "kl": kl.value, "kl_se": kl.se}
    return {
        **({"size": asked.size} if asked.bits is None else {"bits": asked.bits}),
        **windows.describe(),
        "kl": seen["mix"].value,
        "kl_se": seen["mix"].se,
        "expected": mix.expected,
        "uniform": other,
        "kept": kept,
    }


def _word(mix: Mix | None) -> str:
    found = None if mix is None else mix.uniform
    return "the same choice" if found is None else str(found)


def _target(options: QuantizeOptions) -> TargetOptions:
    assert options.target is not None
    return options.target


def _names(model: LayeredModel, number: int, plan: QuantizePlan) -> Iterator[str]:
    quantized = {tensor.name for tensor in plan.quantized}
    for site in find_sites(model, number, quantized):
        yield from (stored.tensor for stored in site.stored)


def _specs(choices: Mapping[str, Choice], options: QuantizeOptions) -> dict[str, QuantSpec | None]:
    return {name: choice.spec(options.spec) for name, choice in choices.items()}


def _choices(options: QuantizeOptions) -> tuple[Choice, ...]:
    asked = _target(options)
    families = asked.families or tuple(FAMILIES)
    if options.spec.zero_point == ZeroPoint.INTEGER:
        families = tuple(name for name in families if FAMILIES[name].uniform)
    return quantized_choices(families, asked.blocks or BLOCKS)


def _fixed(options: QuantizeOptions, names: list[str]) -> dict[str, int]:
    """Bits that --bits-for gives."""
    found: dict[str, int] = {}
    for pattern, bits in options.bits_for:
        found |= {name: bits for name in names if re.search(pattern, name)}
    return found


def _settings(
    options: QuantizeOptions, weighing: Weighing | None, windows: Windows
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
        "seed": _target(options).seed,
    }


def _windows(
    plan: QuantizePlan, options: QuantizeOptions, model: LayeredModel, progress: Progress
) -> Windows:
    """The text that damage is measured on: that of the target, of the calibration, or sampled."""
    asked, calibrate = _target(options), options.calibrate
    text = asked.text or (calibrate.text if calibrate is not None else SELF)
    window = min(asked.window, longest_context(model.model.config) or asked.window)
    chosen = CalibrationOptions(
        text, tokens=asked.tokens, window=window, seed=asked.seed, held_out=asked.held_out
    )
    progress.stage("reading the text")
    folder = plan.folder
    tokenizer = source_tokenizer(folder.source, folder.made, folder.carried, folder.config)
    if text == SELF:
        if options.stream:
            raise UsageError(
                "a target without a text samples one from the whole model, which --stream never "
                "has on the disk: give --target-text, or leave out --stream"
            )
        with torch_threads(options.threads):
            ids, name = sample_tokens(model, tokenizer, chosen, progress), SELF
    else:
        ids, name = tokenize_source(chosen, tokenizer)
    windows = choose_windows(ids, chosen, name)
    check_vocabulary(model.model, windows.ids)
    return windows


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` for hidden states, gone afterwards."""
    real = out.expanduser().resolve()
    folder = real.with_name(f"{real.name}.states")
    with os_errors("create it", folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
