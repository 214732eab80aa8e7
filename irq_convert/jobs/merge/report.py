"""What a finished merge has to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from irq_convert.jobs.merge.check_layers import LayerCheck


@dataclass(frozen=True)
class LogitsCheck:
    """Logits of base plus adapter and of the result on the fixed probe.

    `difference` is the largest, relative to the largest logit; None where it was not taken, and
    `reason` says why. `effect` is what the adapter itself changes, in the same measure; `tolerance`
    None where the difference is only reported.
    """

    difference: float | None = None
    effect: float | None = None
    tolerance: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class MergedLayer:
    """One layer: how it was merged: "dense", "tau" (that moved), "statistics" (scale too),
    "requantized", "folded" or "unchanged".

    `change` is the root of the sum of squares of what the adapter adds, relative to the weights;
    `survived` the part of it that is in the result, 1 - error / change in squares.
    """

    tensor: str
    how: str
    survived: float | None = None
    change: float | None = None
    check: LayerCheck | None = None


@dataclass(frozen=True)
class MergeReport:
    """Sizes in bytes, `seconds` for the whole run.

    `saved` are tensors that the adapter brings, whole or some rows of them; `untied` are those that
    the artifact did not have, since the model tied them to another. `tau` holds the costs of
    storing the moved taus, by dtype, `scale` those of moved scales, `tau_dtype` says which was
    taken; `survived` is over all layers that were quantized again.
    """

    to: str
    out: str
    kind: str
    base_sha256: str
    adapter_sha256: str
    bytes_in: int
    bytes_out: int
    dtypes: Mapping[str, int]
    layers: tuple[MergedLayer, ...]
    saved: tuple[str, ...]
    tau: Mapping[str, Any] | None = None
    scale: Mapping[str, Any] | None = None
    tau_dtype: str | None = None
    survived: float | None = None
    bits_per_weight: float | None = None
    layers_checked: bool = False
    logits: LogitsCheck = field(default_factory=LogitsCheck)
    seconds: float = 0.0
    untied: tuple[str, ...] = ()

    @property
    def largest_difference(self) -> float | None:
        """Of all layers that were checked, on their probes."""
        found = [layer.check.difference for layer in self.layers if layer.check is not None]
        return max(found, default=None)

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return {**asdict(self), "largest_difference": self.largest_difference}
