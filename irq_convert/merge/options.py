"""What a merge is asked to do: one frozen object, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum

from irq_convert.artifact.dense import Dtype
from irq_convert.core.spec import OBJECTIVES
from irq_convert.errors import UsageError
from irq_convert.jobs.resume import Resume

MAX_SHARD_BYTES = 5_000_000_000
TILE_WEIGHTS = 1 << 20
MIN_SURVIVAL = 0.5


class Target(StrEnum):
    """What is written: a dense checkpoint, a plain LoRA, or an artifact of the same kind."""

    DENSE = "dense"
    ADAPTER = "adapter"
    IRQ = "irq"


class Tau(StrEnum):
    """How a moved tau is stored; float32 is exact."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    UINT8 = "uint8"


class Check(StrEnum):
    """How the result is checked: layer by layer, and by the logits where both models fit."""

    AUTO = "auto"
    LAYERS = "layers"
    LOGITS = "logits"
    NONE = "none"


@dataclass(frozen=True)
class MergeOptions:
    """Options of one merge.

    `dtype` is for `Target.DENSE`; `tau`, `objective` (None: the artifact's) and `min_survival`
    for `Target.IRQ`. `any_base` merges an adapter that records no base, or another. `threads` is
    for all computing, None for all cores; `tile_weights` bounds memory. `resume` says whether
    shards that an earlier run has left are used; a folded adapter has none.
    """

    to: Target = Target.DENSE
    dtype: Dtype = Dtype.AUTO
    tau: Tau = Tau.FLOAT32
    objective: str | None = None
    min_survival: float = MIN_SURVIVAL
    check: Check = Check.AUTO
    any_base: bool = False
    threads: int | None = None
    overwrite: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    tile_weights: int = TILE_WEIGHTS
    resume: Resume = Resume.AUTO

    def __post_init__(self) -> None:
        if self.objective is not None and self.objective not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise UsageError(f"--objective {self.objective}: choose one of {known}")
        if math.isnan(self.min_survival) or self.min_survival > 1:
            raise UsageError(f"--min-survival {self.min_survival}: at most 1 can survive")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}: at least 1")
        if self.max_shard_bytes < 1:
            raise UsageError(f"a shard of {self.max_shard_bytes} bytes holds nothing: at least 1")
        if self.tile_weights < 1:
            raise UsageError(f"tiles of {self.tile_weights} weights: at least 1")
        if self.resume == Resume.REQUIRED and self.to == Target.ADAPTER:
            raise UsageError("--resume required is for --to dense and irq: an adapter is one file")
        for name, owner in (
            ("dtype", Target.DENSE),
            ("tau", Target.IRQ),
            ("objective", Target.IRQ),
        ):
            default = MergeOptions.__dataclass_fields__[name].default
            if getattr(self, name) != default and self.to != owner:
                raise UsageError(f"--{name} is for --to {owner.value}, not --to {self.to.value}")

    def to_dict(self) -> dict[str, object]:
        """What decides the bytes of the result."""
        names = {
            Target.DENSE: ("dtype", "max_shard_bytes"),
            Target.ADAPTER: (),
            Target.IRQ: ("tau", "objective", "min_survival", "max_shard_bytes"),
        }[self.to]
        return {"to": self.to.value, **{k: v for k, v in asdict(self).items() if k in names}}
