"""PEFT's configuration of each kind of adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from irq_convert.artifact.adapter_kinds import AdapterKind, Connection, Statistics

if TYPE_CHECKING:
    from peft import LoraConfig


def adapter_config(
    kind: AdapterKind,
    *,
    connection: str | None = None,
    block_size: int | None = None,
    statistics: str | None = None,
    **lora: Any,
) -> LoraConfig:
    """The configuration of an adapter of `kind`; `lora` is what `peft.LoraConfig` takes.

    `connection` None is both; `block_size` is for pooled adapters on linears that are not
    quantized; `statistics` are trained beside the matrices, or alone, where None means both.
    Raises `UsageError` as `IecLoraConfig`.
    """
    from peft import LoraConfig

    from irq_convert.adapters.config import IecLoraConfig

    if not kind.own and statistics is None:
        return LoraConfig(**lora)
    if not kind.low_rank:
        lora["r"], statistics = 0, statistics or Statistics.BOTH
    given = (connection or Connection.BOTH) if kind.connected else Connection.NONE
    own: dict[str, Any] = {"connection": str(given)}
    if statistics is not None:
        own["statistics"] = str(statistics)
    if kind.pooled:
        own |= {"pool": "block", "block_size": block_size}
    return IecLoraConfig(**lora, **own)
