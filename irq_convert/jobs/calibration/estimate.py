"""What a calibration would cost, from shapes alone: operations, memory and disk."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict, dataclass

import torch

from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.calibration.loop import LayerFile
from irq_convert.jobs.calibration.memo import ROOM
from irq_convert.jobs.calibration.sites import Site, find_sites
from irq_convert.jobs.calibration.states import CHUNK_TOKENS
from irq_convert.jobs.calibration.text import Windows

PASSES = 3.2
"""Forward passes of all windows: source, quantized, what is run again, and the data-free one."""
_TRIAL = (512, 1024)


@dataclass(frozen=True)
class CalibrationCost:
    """`tokens` in `windows`; `seconds` from the rate of products measured here, `memory` about,
    `disk` in bytes for hidden states and finished layers beside the output."""

    windows: int
    tokens: int
    layers: int
    seconds: float
    memory: int
    disk: int

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return asdict(self)


def estimate_calibration(
    model: LayeredModel, layers: Collection[LayerFile], windows: Windows
) -> CalibrationCost:
    """The cost of the loop over `layers`; one product is timed, and nothing read."""
    count, width = windows.ids.shape
    tokens, hidden = count * width, model.model.config.get_text_config().hidden_size
    work, largest, widest, inputs = 0.0, 0, 0, 0
    for number, file in enumerate(layers):
        sites = find_sites(model, number, file.tensors)
        work += tokens * (2 * PASSES * _used(model, sites) + sum(4 * c**2 for c in _groups(sites)))
        module = model.module(model.layers[number])
        largest = max(largest, sum(p.numel() for p in module.parameters()))
        widest = max([widest, *(site.cols for site in sites)])
        inputs = max(inputs, sum(_groups(sites)))
    states = 4 * hidden * width * (2 * count + windows.held_out)
    chunk = 4 * CHUNK_TOKENS * 8 * max(hidden, widest)
    return CalibrationCost(
        windows=count,
        tokens=tokens,
        layers=len(layers),
        seconds=work / _rate(model.device),
        memory=4 * largest + 8 * widest**2 + ROOM + chunk,
        disk=2 * states + 4 * tokens * inputs + sum(file.nbytes for file in layers),
    )


def _used(model: LayeredModel, sites: Collection[Site]) -> int:
    """Weights that a token meets: of experts about a tenth."""
    found = 0
    for site in sites:
        numel = model.module(site.module).get_parameter(site.parameter).numel()
        found += max(numel // 10, numel // site.matrices) if site.stacked else numel
    return found


def _groups(sites: Collection[Site]) -> list[int]:
    """Columns of each group of weights that are likely to share their inputs."""
    return [cols for _, cols in {(site.module.rpartition(".")[0], site.cols) for site in sites}]


def _rate(device: str) -> float:
    """Operations a second of a product in float32, measured."""
    rows, cols = _TRIAL
    one = torch.ones(rows, cols, device=device)
    other = torch.ones(cols, cols, device=device)
    best = 0.0
    for _ in range(3):
        begun = time.perf_counter()
        float((one @ other)[0, 0])
        best = max(best, 2 * rows * cols * cols / (time.perf_counter() - begun))
    return best
