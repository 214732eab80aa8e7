"""`quantization_config` as transformers holds it: checked, and written back exactly as read."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from irq_convert.artifact.config import QUANT_METHOD, QuantizationConfig


class IrqConfig(QuantizationConfigMixin):
    """The configuration of an irq artifact, by the keys of formats/irq-v1.md, section 2.

    Raises `IrqError` for a missing, unknown or contradictory key. Nothing in it can be changed at
    load time: every key describes the bytes of the files.
    """

    quant_method: Any = QUANT_METHOD

    def __init__(self, **fields: Any) -> None:
        self._fields = copy.deepcopy({"quant_method": QUANT_METHOD, **fields})
        self.parsed = QuantizationConfig.from_dict(self._fields)

    @property
    def modules_to_not_convert(self) -> list[str]:
        """Names of modules whose weights are matrices but dense."""
        return list(self.parsed.modules_to_not_convert)

    def to_dict(self) -> dict[str, Any]:
        """The keys and values that the configuration was made of."""
        return copy.deepcopy(self._fields)

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Change nothing; return `kwargs` as unused."""
        return kwargs

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IrqConfig) and self._fields == other._fields

    __hash__ = None  # type: ignore[assignment]
