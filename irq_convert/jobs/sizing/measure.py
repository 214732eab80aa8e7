"""What every choice is expected to cost at every weight: one pass there, and one back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from irq_convert.artifact.sensitivity import Sensitivity, Width
from irq_convert.core.codebook import WIDTHS
from irq_convert.core.solver.moments import full_precision
from irq_convert.core.spec import QuantSpec
from irq_convert.core.threads import torch_threads
from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.calibration.states import StateFile
from irq_convert.jobs.calibration.text import Windows
from irq_convert.jobs.common.metrics import MeanEstimate
from irq_convert.jobs.sizing.backward import Backward
from irq_convert.jobs.sizing.choices import Choice
from irq_convert.jobs.sizing.damage import damages
from irq_convert.jobs.sizing.depth import Bands
from irq_convert.jobs.sizing.ends import Ends
from irq_convert.jobs.sizing.forward import Forward, layer_bytes
from irq_convert.progress import Progress


@dataclass(frozen=True)
class Subject:
    """What is measured: `tensors` of `model`, by their names in the files, on `windows`.

    `base` says how a weight is quantized, besides the choice; `weigh` as in `Forward`.
    """

    model: LayeredModel
    tensors: tuple[str, ...]
    windows: Windows
    base: QuantSpec
    weigh: Mapping[str, np.ndarray] | str | None
    seed: int = 0
    threads: int | None = None


def measure_sensitivity(
    subject: Subject,
    choices: Sequence[Choice],
    settings: Mapping[str, Any],
    source: Mapping[str, Any],
    folder: Path,
    progress: Progress,
) -> Sensitivity:
    """The expected damage of all `choices` at every tensor, and what each width costs in truth.

    States wait in `folder`, which exists: 4 bytes x tokens x width for every layer. A tensor that
    the text does not reach has damage 0, but an expert the mean of its layer's. Raises `IrqError`
    and `NotLayered` as the passes do.
    """
    model, layers = subject.model, len(subject.model.layers)
    ends = Ends.of(model, subject.tensors)
    progress.phase("measuring", 2 * layers, 2 * _all_bytes(model))
    looked_up = ends.embedding is not None
    model.read_order = model.plan_reading(0, passes=1, back=True, to_start=looked_up)
    widths = {str(bits): choice for bits in WIDTHS if (choice := _of_width(choices, bits))}
    streams = {
        bits: dict.fromkeys(subject.tensors, choice.spec(subject.base))
        for bits, choice in widths.items()
    }
    bands = Bands.of(model, subject.tensors, widths)
    if bands is not None:
        streams |= bands.streams(subject.tensors, subject.base)
    forward = Forward(
        model, subject.windows, streams, subject.weigh, folder, progress, subject.threads,
        keep_states=True,
    )  # fmt: skip
    back = Backward(
        model, subject.windows, frozenset(subject.tensors), ends, forward.means, forward.states,
        folder, progress,
    )  # fmt: skip
    heard = _Heard(subject, choices, forward.importance)
    with torch.no_grad(), torch_threads(subject.threads), full_precision(), ExitStack() as files:

        def behind(states: StateFile) -> None:
            back.begin(states, files, subject.seed, heard.damage)

        seen = forward.run(behind)
        back.run(heard.damage)
    if forward.unreached:
        progress.note(
            f"{forward.unreached} experts were reached by no token and count as much as the mean "
            "of their layer's: more --target-tokens help"
        )
    names = tuple(str(choice) for choice in choices)
    told = _widths(heard.found, names, widths, seen)
    depth = {} if bands is None else bands.factors(heard.found, names, told, seen)
    return Sensitivity(heard.found, names, told, settings, source, depth)


class _Heard:
    """What the way back tells: what each choice damages, `found` by tensor."""

    def __init__(
        self,
        subject: Subject,
        choices: Sequence[Choice],
        importance: Callable[[str], np.ndarray | None],
    ) -> None:
        self._specs = [spec for choice in choices if (spec := choice.spec(subject.base))]
        self._importance, self._threads = importance, subject.threads
        self.found: dict[str, np.ndarray] = {}

    def damage(
        self, name: str, weight: torch.Tensor, inputs: np.ndarray | None, outputs: np.ndarray
    ) -> None:
        """A `Damage`; what is told of a tensor more than once adds up."""
        own = np.zeros(len(self._specs))
        if inputs is not None:
            own = damages(
                weight, inputs, outputs, self._specs, importance=self._importance(name),
                name=name, threads=self._threads,
            )  # fmt: skip
        self.found[name] = self.found.get(name, 0.0) + own


def compare(
    subject: Subject,
    mixes: Mapping[str, Mapping[str, QuantSpec | None]],
    folder: Path,
    progress: Progress,
) -> dict[str, MeanEstimate]:
    """KL divergence to the source of every one of `mixes`, on the held-out windows."""
    model = subject.model
    progress.phase("judging", len(model.layers), _all_bytes(model))
    model.read_order = model.plan_reading(0, passes=1)
    forward = Forward(
        model, subject.windows, mixes, subject.weigh, folder, progress, subject.threads
    )
    with torch.no_grad(), torch_threads(subject.threads), full_precision():
        return forward.run()


def _all_bytes(model: LayeredModel) -> int:
    return sum(layer_bytes(model, number) for number in range(len(model.layers)))


def _of_width(choices: Sequence[Choice], bits: int) -> Choice | None:
    """The choice that stands for a width: the first family, and the block nearest to 64."""
    mine = [choice for choice in choices if choice.bits == bits and choice.block_size]
    return min(mine, key=lambda choice: abs((choice.block_size or 0) - 64), default=None)


def _widths(
    found: Mapping[str, np.ndarray],
    names: Sequence[str],
    widths: Mapping[str, Choice],
    seen: Mapping[str, MeanEstimate],
) -> dict[int, Width]:
    result = {}
    for bits, choice in widths.items():
        at = names.index(str(choice))
        expected = float(sum(values[at] for values in found.values()))
        if expected > 0 and seen[bits].value > 0:
            result[int(bits)] = Width(expected, seen[bits].value, seen[bits].se)
    return result
