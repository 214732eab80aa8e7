"""What measuring has found, or would do."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class MeasureReport:
    """`tensors` were measured of `linear`, those that `quantize` would quantize by default.

    `unreached` are names that the text did not reach; `experts` counts experts that no token
    reached, of which their layer's mean stands. `how`: "layer by layer" or "whole". `bytes` is the
    size of the file `out`, `seconds` the time of the whole run.
    """

    out: str
    model: str
    text: str
    tokens: int
    windows: int
    window: int
    how: str
    linear: int
    tensors: int
    unreached: tuple[str, ...]
    experts: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class MeasureEstimate:
    """What measuring with the same arguments would do: `disk_needed` bytes beside the file `out`
    for as long as it works, and `memory` for weights, of the largest layer or of the whole model.
    """

    out: str
    model: str
    text: str
    tokens: int
    windows: int
    window: int
    how: str
    linear: int
    disk_needed: int
    disk_free: int
    memory: int

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return asdict(self)
