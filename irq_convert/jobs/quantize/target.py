"""A size that is asked for: from the plan that keeps every weight alike to that of the best mix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from irq_convert.artifact.sensitivity import EXPECTED, View
from irq_convert.jobs.common.metrics import MeanEstimate
from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.jobs.quantize.importance import Weighing
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import QuantizePlan, replan
from irq_convert.jobs.quantize.target_bytes import choice_specs, chosen_bytes, target_of
from irq_convert.jobs.quantize.target_plan import (
    Target,
    layers_or_refused,
    plan_target,
    scratch_folder,
)
from irq_convert.jobs.sizing.choices import Choice
from irq_convert.jobs.sizing.measure import compare
from irq_convert.jobs.sizing.mix import Mix
from irq_convert.progress import Progress

VIEWS = (View(), View(width=2.0), View(depth=1.0))
"""Of the damages: a mix for each of them is judged."""


@dataclass(frozen=True)
class Sized:
    """The plan of the choice, and the manifest's `target`.

    `other` is the plan of the best uniform choice where what is calibrated decides between them.
    """

    plan: QuantizePlan
    record: Mapping[str, Any] | None
    other: QuantizePlan | None = None


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
        return _sized(plan, options, json.loads(processes.take("target")))
    with scratch_folder(out) as folder:
        target = plan_target(plan, model, out, options, weighing, folder, progress)
        mixes, uniform = choose(target)
        mix, seen = _judged(target, mixes, uniform, folder, progress)
    better = uniform is None or seen["mix"].value <= seen["uniform"].value
    # What is calibrated afterwards is judged again, and both are.
    both = uniform is not None and options.calibrate is not None and uniform != mix
    taken = mix if better or both or uniform is None else uniform
    if taken is not mix:
        progress.note(
            f"{_word(uniform)} for all is better than the mix on held-out windows (KL "
            f"{seen['uniform'].value:.4f} against {seen['mix'].value:.4f}), and is kept"
        )
    told = {
        "record": _record(target, mix, uniform, seen, "mix" if taken is mix else "uniform"),
        "choices": _named(taken),
        "other": _named(uniform) if both and uniform is not None else None,
    }
    processes.put("target", json.dumps(told).encode())
    return _sized(plan, options, told)


def _named(mix: Mix) -> dict[str, str]:
    return {name: str(choice) for name, choice in mix.choices.items()}


def _sized(plan: QuantizePlan, options: QuantizeOptions, told: Mapping[str, Any]) -> Sized:
    """What the first process has told of its choice."""

    def planned(names: Mapping[str, str]) -> QuantizePlan:
        choices = {name: Choice.parse(text) for name, text in names.items()}
        return replan(plan, choice_specs(choices, options))

    other = None if told["other"] is None else planned(told["other"])
    return Sized(planned(told["choices"]), told["record"], other)


@dataclass(frozen=True)
class Point:
    """A mix that could be asked for: bytes of the artifact, bits of a weight, the KL expected.

    `nearest` marks the one that is nearest to what was asked for.
    """

    size: int
    bits: float
    expected: float
    nearest: bool = False


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
    mix = _best(target)
    found = target.market.frontier()
    nearest = min(found, key=lambda point: abs(point[0] - mix.nbytes))
    points = tuple(
        Point(nbytes + target.outside, 8 * nbytes / target.weights, kl, (nbytes, kl) == nearest)
        for nbytes, kl in found
    )
    return replan(plan, choice_specs(mix.choices, options)), points


def choose(target: Target) -> tuple[list[Mix], Mix | None]:
    """The best mixes that fit with all around them, and the best uniform choice that does."""
    market = target.market
    found = [_best(target, view) for view in VIEWS]
    mixes = [mix for at, mix in enumerate(found) if mix not in found[:at]]
    return mixes, _fitted(target, market.best_uniform)


def _best(target: Target, view: View = EXPECTED) -> Mix:
    found = _fitted(target, partial(target.market.best, view=view))
    # `refuse_unreachable` has seen that the smallest fits.
    return target.market.smallest if found is None else found


def _fitted(target: Target, pick: Callable[[int], Mix | None]) -> Mix | None:
    """The mix whose whole artifact fits: headers and configuration change with the choice."""
    asked, room = target_of(target.options), target.room
    for _ in range(16):
        found = pick(room)
        if found is None or asked.size is None:
            return found
        over = chosen_bytes(target.plan, target.options, found.choices) - asked.size
        if over <= 0:
            return found
        room = min(room, found.nbytes) - over
    return None


def _judged(
    target: Target, mixes: Sequence[Mix], uniform: Mix | None, folder: Path, progress: Progress
) -> tuple[Mix, dict[str, MeanEstimate]]:
    """The best of `mixes` on held-out windows; its KL, and that of the uniform choice if any."""
    candidates = {str(number): mix for number, mix in enumerate(mixes)}
    if uniform is not None:
        candidates["uniform"] = uniform
    specs = {name: choice_specs(each.choices, target.options) for name, each in candidates.items()}
    with layers_or_refused(target.plan):
        found = compare(target.subject, specs, folder, progress)
    best = min(range(len(mixes)), key=lambda number: found[str(number)].value)
    seen = {"mix": found[str(best)]}
    return mixes[best], seen | {name: found[name] for name in found if name == "uniform"}


def _record(
    target: Target,
    mix: Mix,
    uniform: Mix | None,
    seen: Mapping[str, MeanEstimate],
    kept: str,
) -> dict[str, Any]:
    """The manifest's `target`."""
    asked, windows = target_of(target.options), target.subject.windows
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
