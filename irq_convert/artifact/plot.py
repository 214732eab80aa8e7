"""One picture of an artifact: entropy gained and error made, tensor by tensor along the layers."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from irq_convert.artifact.contents import Artifact
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.artifact.summary import OTHER, kind_name, layer_name, natural_key, statistics
from irq_convert.checkpoint.files import write_bytes_atomic
from irq_convert.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette; with the markers beside it told apart by everyone and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
BEFORE, AFTER, LIMIT, LINE = "#D55E00", "#0072B2", "#000000", "#BBBBBB"
SPREAD = 0.64
MOST_TICKS = 32
MOST_KINDS = 14
LOG_FROM = 8.0


@dataclass(frozen=True)
class _Point:
    """A quantized tensor at its place along the layers."""

    x: float
    kind: str
    bits: int
    before: float
    after: float
    error: float


def plot_summary(artifact: Artifact, file: Path) -> None:
    """Draw `artifact` to the PNG `file`: entropy before and after above, relative error below.

    Raises `UsageError` when `file` is not named .png, matplotlib is not installed, or the artifact
    has no manifest and so no statistics; `IrqError` when the file cannot be written.
    """
    if file.suffix.lower() != ".png":
        raise UsageError(f"{file}: the plot is a PNG image; give a name that ends in .png")
    if artifact.manifest is None:
        raise UsageError(
            f"{artifact.folder}: has no {MANIFEST_NAME}, which holds what the plot shows; only "
            "`irq-convert quantize` writes it"
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib: pip install 'irq-convert[plot]'") from None
    layers = sorted({layer_name(t.name) for t in artifact.quantized}, key=natural_key)
    points = _points(artifact, layers)
    width = min(15.0, max(8.5, 5.0 + 0.22 * len(layers)))
    figure = Figure(figsize=(width, 7.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(_title(artifact), fontsize=12)
    size = max(2.5, min(6.0, 60.0 * width / 8.5 / max(1, len(points)) ** 0.6))
    _draw_entropy(upper, points, size)
    _draw_error(lower, points, size)
    _label_layers(lower, layers)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_bytes_atomic(file, image.getvalue())


def _points(artifact: Artifact, layers: Sequence[str]) -> list[_Point]:
    """Tensors by layer, side by side in the order of their kinds."""
    entries = statistics(artifact)
    kinds = sorted({kind_name(tensor.name) for tensor in artifact.quantized}, key=natural_key)
    points = []
    for tensor in artifact.quantized:
        entry, kind = entries[tensor.name], kind_name(tensor.name)
        aside = SPREAD * ((kinds.index(kind) + 0.5) / len(kinds) - 0.5)
        points.append(
            _Point(
                x=layers.index(layer_name(tensor.name)) + aside,
                kind=kind,
                bits=tensor.format.bits,
                before=entry["entropy_plain"],
                after=entry["entropy"],
                error=entry["relative_error"],
            )
        )
    return sorted(points, key=lambda point: point.x)


def _title(artifact: Artifact) -> str:
    names = sorted({tensor.format.codebook for tensor in artifact.quantized})
    sizes = sorted({tensor.format.block_size for tensor in artifact.quantized})
    source = (artifact.manifest or {})["source"].get("model", "")
    return (
        f"{source}: {', '.join(names)}, blocks of {', '.join(map(str, sizes))}, "
        f"{artifact.bits_per_weight:.2f} bits per weight"
    )


def _draw_entropy(axes: Axes, points: Sequence[_Point], size: float) -> None:
    """Before, after and the most that the codebook allows, for each tensor."""
    xs = [p.x for p in points]
    low, high = [p.before for p in points], [p.after for p in points]
    axes.vlines(xs, low, high, color=LINE, linewidth=1.0, zorder=1)
    limits, label = [p.bits for p in points], "maximum (bits a code)"
    if len(set(limits)) == 1:
        axes.axhline(limits[0], color=LIMIT, linewidth=1.4, label=label)
    else:
        half = SPREAD / 2 / len({p.kind for p in points})
        left, right = [x - half for x in xs], [x + half for x in xs]
        axes.hlines(limits, left, right, color=LIMIT, linewidth=1.4, label=label)
    axes.plot(xs, low, "o", color=BEFORE, mfc="white", ms=size, label="before calibration")
    axes.plot(xs, high, "o", color=AFTER, ms=size, label="as stored")
    axes.set_ylabel("entropy, bits a code")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _draw_error(axes: Axes, points: Sequence[_Point], size: float) -> None:
    """Relative error of each tensor, by kind."""
    kinds = sorted({p.kind for p in points}, key=natural_key)
    for number, kind in enumerate(kinds):
        mine = [p for p in points if p.kind == kind]
        axes.plot(
            [p.x for p in mine],
            [p.error for p in mine],
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            ms=size,
            label=kind if number < MOST_KINDS else "_nolegend_",
        )
    errors = [p.error for p in points]
    if min(errors) > 0 and max(errors) / min(errors) > LOG_FROM:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, max(*errors, 1e-12) * 1.08)
    axes.set_ylabel("relative squared error")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)


def _label_layers(axes: Axes, layers: Sequence[str]) -> None:
    """Number the layers; where there are several stacks, name each at its first."""
    stacks = [name.rpartition(".")[0] if name != OTHER else OTHER for name in layers]
    step = math.ceil(len(layers) / MOST_TICKS)
    ticks, labels = [], []
    for at, name in enumerate(layers):
        first = at == 0 or stacks[at] != stacks[at - 1]
        if not first and (at - stacks.index(stacks[at])) % step:
            continue
        number = name.rpartition(".")[2]
        several = len(set(stacks)) > 1 and first and name != OTHER
        ticks.append(at)
        labels.append(f"{number}\n{stacks[at]}" if several else number)
    axes.set_xticks(ticks, labels)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_xlabel("layer" if len({*stacks, OTHER}) != 2 else f"layer ({stacks[0]})")
