"""Adapters that start where the damage is: B A is the low-rank part of what quantizing has lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.contents import Artifact
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.core.error_start import LowRank
from irq_convert.errors import UsageError
from irq_convert.hf.layer_calls import NotLayered
from irq_convert.hf.layered import open_layered
from irq_convert.hf.limits import check_context, check_vocabulary
from irq_convert.jobs.calibration.importance_file import MEASURE, ColumnValues, ImportanceFile
from irq_convert.jobs.calibration.text import Windows
from irq_convert.jobs.finetune.start_layers import AdaptedLayer, Weights, adapted_layers
from irq_convert.jobs.finetune.start_text import TextStart
from irq_convert.progress import Progress


@dataclass(frozen=True)
class Left:
    """The squared error of one layer `before`, and what is `left` of it with the adapter."""

    before: float
    left: float

    @property
    def part(self) -> float:
        """What is left, as a part."""
        return self.left / self.before if self.before else 0.0


@dataclass(frozen=True)
class StartReport:
    """What a start has taken away: errors by tensor, in squares of what its layer puts out.

    `how`: "identity", "importance" or "text". `unweighed`: adapted tensors that importance or text
    has nothing of, and that took the error of the weights alone.
    """

    how: str
    layers: Mapping[str, Left]
    unweighed: tuple[str, ...] = ()

    @property
    def left(self) -> float:
        """The part of the squared error that is left, of all layers together."""
        before = sum(each.before for each in self.layers.values())
        return sum(each.left for each in self.layers.values()) / before if before else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "how": self.how,
            "left": self.left,
            "layers": {name: each.part for name, each in self.layers.items()},
            "unweighed": list(self.unweighed),
        }


def start_from_error(
    model: Any,
    artifact: Artifact,
    source: Checkpoint,
    *,
    inputs: ImportanceFile | Windows | None = None,
    adapter: str = "default",
    device: str = "cpu",
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> StartReport:
    """Set A and B of `adapter` so that they take away what `artifact` lost of `source`.

    `model` is the artifact's, with a LoRA of any of our kinds on it (`attach`); `source` has its
    files on the disk. `inputs` say what counts: windows of a text, run through both layer by layer
    on `device` with hidden states in `scratch`; a file of importance; or nothing, all inputs alike.
    Only A and B are changed, and betas, to 0: without the adapter the model is the artifact.
    Adapters on dense layers keep the start they have. Of each matrix one copy is in memory, and its
    moments.

    Equal arguments and threads give equal bytes. Raises `UsageError` where `source` is another
    model's, importance is of another model's, or a text is for a class that cannot be run layer by
    layer; `IrqError` naming the tensor for numbers that are not finite.
    """
    progress = progress or Progress()
    layers = adapted_layers(model, adapter)
    weights = Weights(artifact, source, device)
    weights.check(layers)
    found: dict[str, LowRank] = {}
    if isinstance(inputs, Windows):
        how, found = "text", _by_text(weights, layers, inputs, scratch, progress)
    elif inputs is not None:
        columns = ColumnValues(inputs, source)
        how, found = "importance", _by_columns(weights, layers, columns, progress)
        if not found:
            raise UsageError(
                f"{inputs.path}: has nothing of the {len(layers)} adapted weights, the first is "
                f"{min(layers)}: the file is of another model: {MEASURE}"
            )
    else:
        how = "identity"
    rest = {tensor: layer for tensor, layer in layers.items() if tensor not in found}
    if rest and found:
        progress.note(
            f"{len(rest)} adapters start from the error of the weights alone, which the {how} says "
            f"nothing of, the first is that of {min(rest)}"
        )
    found |= _by_columns(weights, rest, None, progress)
    errors = {tensor: Left(found[tensor].before, found[tensor].left) for tensor in layers}
    return StartReport(how, errors, tuple(rest) if inputs is not None else ())


def _by_columns(
    weights: Weights,
    layers: Mapping[str, AdaptedLayer],
    columns: ColumnValues | None,
    progress: Progress,
) -> dict[str, LowRank]:
    """Starts by the mean square of each column, or by none; tensors that have none are left out."""
    wanted: dict[str, torch.Tensor] = {}
    for tensor, layer in layers.items():
        if columns is None:
            wanted[tensor] = torch.ones(layer.cols)
            continue
        values = columns.find(tensor, weights.info(tensor).shape, layer.cols)
        if values is not None:
            wanted[tensor] = torch.from_numpy(values[0])
    found: dict[str, LowRank] = {}
    if wanted:
        progress.phase("starting adapters", len(wanted), len(wanted))
    for tensor, own in wanted.items():
        found[tensor] = layers[tensor].start(weights.lost(tensor), own)
        progress.advance(1, finished=1)
    return found


def _by_text(
    weights: Weights,
    layers: Mapping[str, AdaptedLayer],
    windows: Windows,
    scratch: Path | None,
    progress: Progress,
) -> dict[str, LowRank]:
    """Starts by what a text puts in; adapters that it does not reach are left out."""
    try:
        model = open_layered(weights.source, weights.device)
        check_context(model.model.config, windows.ids.shape[1], "a window of")
        check_vocabulary(model.model, windows.ids)
        return TextStart(model, weights, layers, windows.ids, progress, scratch).run()
    except NotLayered as error:
        raise UsageError(
            f"{weights.source.folder}: cannot be run layer by layer over a text: {error}: start "
            "with importance (irq-convert measure), or without"
        ) from error
