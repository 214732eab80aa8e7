"""What a merge is asked to do: one frozen object, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from irq_convert.artifact.dense_dtype import Dtype
from irq_convert.core.objective import Objective
from irq_convert.errors import UsageError
from irq_convert.jobs.common.options import MAX_SHARD_BYTES, as_choice, check_sizes, fix_choices
from irq_convert.jobs.common.resume import Resume

TILE_WEIGHTS = 1 << 20
MIN_SURVIVAL = 0.5


class MergeTo(StrEnum):
    """What is written: a dense checkpoint, a plain LoRA, or an artifact of the same kind."""

    DENSE = "dense"
    ADAPTER = "adapter"
    IRQ = "irq"


class TauDtype(StrEnum):
    """How moved statistics are stored; float32 is exact."""

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

    `dtype` is for `MergeTo.DENSE`; `tau`, how moved statistics are stored (None: uint8, as the
    artifact's own, where an adapter has trained statistics, else float32), `objective` (None: the
    artifact's) and `min_survival` for `MergeTo.IRQ`. `any_base` merges an adapter that records no
    base, or another. `threads` is for all computing, None for all cores; `tile_weights` bounds
    memory. `resume` says whether shards that an earlier run has left are used; a folded adapter has
    none. `trust_remote_code` lets the check run code that comes with the model, without which such
    a model is not compared.
    """

    to: MergeTo = MergeTo.DENSE
    dtype: Dtype = Dtype.AUTO
    tau: TauDtype | None = None
    objective: str | None = None
    min_survival: float = MIN_SURVIVAL
    check: Check = Check.AUTO
    any_base: bool = False
    threads: int | None = None
    overwrite: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    tile_weights: int = TILE_WEIGHTS
    resume: Resume = Resume.AUTO
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        fix_choices(self, to=MergeTo, dtype=Dtype, tau=TauDtype, check=Check, resume=Resume)
        if self.objective is not None:
            object.__setattr__(
                self, "objective", as_choice(Objective, self.objective, "objective").value
            )
        if math.isnan(self.min_survival) or self.min_survival > 1:
            raise UsageError(f"--min-survival {self.min_survival}: at most 1 can survive")
        check_sizes(self.threads, self.max_shard_bytes, self.tile_weights)
        if self.resume == Resume.REQUIRED and self.to == MergeTo.ADAPTER:
            raise UsageError("--resume required is for --to dense and irq: an adapter is one file")
        for name, owner in (
            ("dtype", MergeTo.DENSE),
            ("tau", MergeTo.IRQ),
            ("objective", MergeTo.IRQ),
        ):
            default = MergeOptions.__dataclass_fields__[name].default
            if getattr(self, name) != default and self.to != owner:
                raise UsageError(f"--{name} is for --to {owner.value}, not --to {self.to.value}")

    @property
    def stored(self) -> TauDtype:
        """How moved statistics are stored, for an adapter that is known (`for_adapter`)."""
        return self.tau or TauDtype.FLOAT32

    def for_adapter(self, statistics: bool) -> MergeOptions:
        """The options with what depends on whether the adapter has trained `statistics`."""
        if self.to != MergeTo.IRQ or self.tau is not None:
            return self
        return replace(self, tau=TauDtype.UINT8 if statistics else TauDtype.FLOAT32)

    def to_dict(self) -> dict[str, object]:
        """What decides the bytes of the result."""
        names = {
            MergeTo.DENSE: ("dtype", "max_shard_bytes"),
            MergeTo.ADAPTER: (),
            MergeTo.IRQ: ("tau", "objective", "min_survival", "max_shard_bytes"),
        }[self.to]
        return {"to": self.to.value, **{k: v for k, v in asdict(self).items() if k in names}}
