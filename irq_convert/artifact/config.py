"""`quantization_config` of format "irq": parsing, checks, per-module overrides, back to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from irq_convert.core.blocks import GROUP_SIZE
from irq_convert.core.codebook import CODEBOOKS, get_codebook
from irq_convert.core.parts import SUFFIXES
from irq_convert.core.spec import BLOCK_SIZES
from irq_convert.core.statistic_dtypes import STATISTIC_DTYPES, UINT8
from irq_convert.errors import IrqError

QUANT_METHOD = "irq"
FORMAT_VERSION = 1
PART_SUFFIXES = SUFFIXES[1:]


@dataclass(frozen=True)
class ModuleFormat:
    """How one tensor is stored; `columns` is None when it follows from the packed width.

    `transposed` says that the last two dimensions of the source are stored swapped.
    """

    codebook: str
    block_size: int
    scale_dtype: str = UINT8.name
    tau_dtype: str = UINT8.name
    columns: int | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.codebook, str) or self.codebook not in CODEBOOKS:
            raise IrqError(f"quantization_config: unknown codebook {self.codebook!r}")
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise IrqError(f"quantization_config: unknown block_size {self.block_size!r}")
        for name in (self.scale_dtype, self.tau_dtype):
            if not isinstance(name, str) or name not in STATISTIC_DTYPES:
                raise IrqError(f"quantization_config: unknown dtype of a statistic {name!r}")
        if self.columns is not None and (type(self.columns) is not int or self.columns < 1):
            raise IrqError(f"quantization_config: columns must be positive, not {self.columns!r}")
        if type(self.transposed) is not bool:
            raise IrqError(f"quantization_config: transposed cannot be {self.transposed!r}")

    @property
    def bits(self) -> int:
        return get_codebook(self.codebook).bits

    def columns_of(self, row_bytes: int) -> int:
        """Columns of a tensor packed to `row_bytes` bytes a row (specification, section 3)."""
        return self.columns if self.columns is not None else 8 * row_bytes // self.bits


@dataclass(frozen=True)
class QuantizationConfig:
    """The parsed configuration; `overrides` hold complete formats by exact module name."""

    default: ModuleFormat
    modules_to_not_convert: tuple[str, ...] = ()
    overrides: Mapping[str, ModuleFormat] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def module(self, name: str) -> ModuleFormat:
        """The format of module `name`, compared whole."""
        return self.overrides.get(name, self.default)

    @cached_property
    def dense_modules(self) -> frozenset[str]:
        """`modules_to_not_convert`, to look names up: a mixture may keep thousands."""
        return frozenset(self.modules_to_not_convert)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the specification, section 2; only what differs is an override."""
        overrides = {
            name: changes
            for name, own in sorted(self.overrides.items())
            if (changes := _changes(own, self.default))
        }
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "codebook": self.default.codebook,
            "bits": self.default.bits,
            "block_size": self.default.block_size,
            "group_size": GROUP_SIZE,
            "scale_dtype": self.default.scale_dtype,
            "tau_dtype": self.default.tau_dtype,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "overrides": overrides,
            "meta": dict(self.meta),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> QuantizationConfig:
        """Parse and check; `IrqError` names the key that is missing, unknown or contradictory."""
        known = set(_REQUIRED) | {"modules_to_not_convert", "overrides", "meta"}
        for key in _REQUIRED:
            if key not in raw:
                raise IrqError(f"quantization_config lacks {key!r}: not a whole irq artifact")
        for key in raw:
            if key not in known:
                raise IrqError(
                    f"quantization_config has the unknown key {key!r}: upgrade irq-convert"
                )
        _expect(raw["quant_method"] == QUANT_METHOD, "quant_method", raw["quant_method"])
        version = raw["format_version"]
        if type(version) is bool or version != FORMAT_VERSION:
            raise IrqError(
                f"the artifact has format version {version!r}, this program reads "
                f"{FORMAT_VERSION}: upgrade irq-convert"
            )
        _expect(raw["group_size"] == GROUP_SIZE, "group_size", raw["group_size"])
        default = _module_format(raw, "quantization_config", None)
        names = raw.get("modules_to_not_convert", [])
        _expect(
            isinstance(names, list) and all(isinstance(n, str) for n in names),
            "modules_to_not_convert",
            names,
        )
        overrides = raw.get("overrides", {})
        _expect(isinstance(overrides, Mapping), "overrides", overrides)
        parsed = {}
        for name, own in overrides.items():
            _expect(isinstance(own, Mapping), f"overrides[{name}]", own)
            parsed[name] = _module_format(own, f"overrides[{name}]", default)
        meta = raw.get("meta")
        return cls(default, tuple(names), parsed, dict(meta) if isinstance(meta, Mapping) else {})


_REQUIRED = (
    "quant_method",
    "format_version",
    "codebook",
    "bits",
    "block_size",
    "group_size",
    "scale_dtype",
    "tau_dtype",
)
_MODULE_KEYS = (
    *("codebook", "bits", "block_size", "scale_dtype", "tau_dtype"),
    *("columns", "transposed"),
)


def _expect(condition: bool, key: str, value: object) -> None:
    if not condition:
        raise IrqError(f"quantization_config: {key} cannot be {value!r} in format irq version 1")


def _module_format(
    raw: Mapping[str, Any], where: str, default: ModuleFormat | None
) -> ModuleFormat:
    if default is not None:
        for key in raw:
            _expect(key in _MODULE_KEYS, where, key)
            _expect(raw[key] is not None, f"{where}: {key}", None)
    kept = {k: raw[k] for k in _MODULE_KEYS if k in raw and k != "bits"}
    own = replace(default, **kept) if default is not None else ModuleFormat(**kept)
    bits = raw.get("bits")
    if (bits is None) != ("codebook" not in raw) or (bits is not None and bits != own.bits):
        raise IrqError(f"{where}: bits {bits!r} and codebook {own.codebook!r} do not agree")
    return own


def _changes(own: ModuleFormat, default: ModuleFormat) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if own.codebook != default.codebook:
        changes |= {"codebook": own.codebook, "bits": own.bits}
    for key in ("block_size", "scale_dtype", "tau_dtype"):
        if getattr(own, key) != getattr(default, key):
            changes[key] = getattr(own, key)
    if own.columns is not None:
        changes["columns"] = own.columns
    if own.transposed:
        changes["transposed"] = True
    return changes


def module_name(tensor: str) -> str:
    """The module of a tensor name: without its `.weight` ending, or the name itself."""
    return tensor.removesuffix(".weight")
