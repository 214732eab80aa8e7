"""`IecLoraConfig`: a LoRA configuration with the connections of IEC and block pooling."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import LoraConfig

from irq_convert.adapters.peft_type import iec_lora
from irq_convert.artifact.adapter_kinds import Connection, Statistics
from irq_convert.core.spec import BLOCK_SIZES
from irq_convert.errors import UsageError

POOLS = (None, "block")


@dataclass
class IecLoraConfig(LoraConfig):
    """Everything of `peft.LoraConfig`, and what IEC-LoRA adds (docs/method.md, "IEC").

    Raises `UsageError` for a value that is none of those named, and for options of `LoraConfig`
    that make another layer of it (DoRA and the like) or write to the base weight.
    """

    connection: str = field(
        default="both",
        metadata={"help": "Which connections learn: both, input (beta1), output (beta2) or none."},
    )
    pool: str | None = field(
        default=None,
        metadata={"help": "'block': the adapter sees block sums and merges by moving tau alone."},
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Block size of pooled adapters on layers that are not quantized."},
    )
    statistics: str | None = field(
        default=None,
        metadata={
            "help": "Train 'tau', 'scale' or 'both' of packed layers; r=0 trains them alone."
        },
    )
    base_sha256: str | None = field(
        default=None,
        metadata={"help": "Identity of the artifact that the adapter belongs to; recorded."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = iec_lora()
        self._check()

    def _check(self) -> None:
        if self.connection not in set(Connection):
            raise UsageError(
                f"connection {self.connection!r}: choose one of {', '.join(Connection)}"
            )
        if self.pool not in POOLS:
            raise UsageError(f"pool {self.pool!r}: choose 'block' or None")
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise UsageError(f"block_size {self.block_size!r}: choose one of {sizes}")
        if self.block_size is not None and self.pool is None:
            raise UsageError("block_size is for adapters with pool='block'")
        if self.statistics not in (None, *Statistics):
            raise UsageError(
                f"statistics {self.statistics!r}: choose one of {', '.join(Statistics)}, or None"
            )
        if self.r == 0:
            self._check_alone()
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise UsageError(
                f"init_lora_weights {self.init_lora_weights!r} changes the base weight, which is "
                "packed: choose True, False or 'gaussian'"
            )
        for name in ("lora_bias", "layer_replication", "target_parameters", "megatron_config"):
            if getattr(self, name, None):
                raise UsageError(f"IEC-LoRA does not take {name}: leave it out or use LoraConfig")

    def _check_alone(self) -> None:
        """An adapter without matrices: what is said of matrices contradicts it."""
        if self.statistics is None:
            raise UsageError("r=0 is an adapter of nothing: give statistics='both', or a rank")
        if self.pool is not None or self.rank_pattern:
            raise UsageError("r=0 trains statistics alone: leave pool and rank_pattern out")
        self.connection = "none"
