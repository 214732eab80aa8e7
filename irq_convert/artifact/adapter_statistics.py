"""Moves of scale and tau in an adapter's file: f and o of docs/method.md, one number a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from irq_convert.artifact.adapter_kinds import Statistics
from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.errors import IrqError

SCALE, TAU = "lora_irq_scale", "lora_irq_tau"


def moved_weight(name: str) -> tuple[str, str] | None:
    """Of tensor `name` of an adapter's file the weight that it moves a statistic of, and which.

    `<module>.<weight>` for `<module>.lora_irq_scale.<weight>`, where the weight is called "weight"
    in a linear layer and otherwise in a stack of experts. None for another tensor.
    """
    module, part, weight = ("", "", *name.rsplit(".", 2))[-3:]
    return (f"{module}.{weight}", part) if part in (SCALE, TAU) else None


@dataclass(frozen=True)
class StoredStatistics:
    """What moves the statistics of one weight: f `[rows, blocks]` of scale, o of tau, or both.

    `weight` is its key in the model; the rows of a stack of experts are those of all of them.
    """

    weight: str
    scale: TensorInfo | None
    tau: TensorInfo | None

    @property
    def parts(self) -> list[TensorInfo]:
        """What there is of the two."""
        return [part for part in (self.scale, self.tau) if part is not None]


def asks(statistics: str | None, name: str) -> bool:
    """Whether settings that say `statistics` have tensors called `name`."""
    one = {SCALE: Statistics.SCALE, TAU: Statistics.TAU}[name]
    return statistics in (Statistics.BOTH, one)


def stored_statistics(
    statistics: str | None, weight: str, parts: Mapping[str, TensorInfo]
) -> StoredStatistics:
    """The moves of `weight` from the tensors in the file, by `SCALE` and `TAU`.

    Raises `IrqError` where they are not those that the settings have, or no matrices of
    floating-point numbers of one shape.
    """
    damaged = "the adapter is damaged: save or download it again"
    for name in (SCALE, TAU):
        if asks(statistics, name) != (name in parts):
            what = "is missing" if name not in parts else "is there"
            raise IrqError(
                f"{name} of {weight} {what}, and the settings have statistics {statistics!r}: "
                f"{damaged}"
            )
    shapes = {info.shape for info in parts.values()}
    for info in parts.values():
        if len(info.shape) != 2 or len(shapes) > 1 or info.dtype not in FLOATS:
            raise IrqError(
                f"{info.shard.name}: {info.name} {info.dtype} {list(info.shape)}: must be a number "
                f"for each block of the layer: {damaged}"
            )
    return StoredStatistics(weight, parts.get(SCALE), parts.get(TAU))
