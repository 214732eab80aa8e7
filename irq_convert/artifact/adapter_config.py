"""`adapter_config.json` read without PEFT: ranks, scalings, targets, and what must be refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_convert.artifact.adapter_kinds import (
    IEC_LORA,
    LORA,
    AdapterKind,
    Connection,
    Statistics,
    kind_of,
)
from irq_convert.artifact.adapter_tokens import KEY, check_tokens
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.core.spec import BLOCK_SIZES
from irq_convert.errors import IrqError, UsageError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
NOTE_FILE = "irq_adapter.json"
OWN_KEYS = ("connection", "pool", "block_size", "statistics", "base_sha256")
"""What an IEC_LORA configuration has beyond a LORA one."""
# Those that leave the base weight alone; the others write to it before training.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_NEUTRAL = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
    "velora_config",
    KEY,
    *OWN_KEYS,
}


@dataclass(frozen=True)
class StoredConfig:
    """The settings of an adapter that a merge needs; `raw` is the whole file.

    `connection` is "none" for plain LoRA, `pooled` says that A acts on block sums. `statistics`
    are those of packed layers that it moves, None for none; `rank` 0 is moving them alone.
    `base_sha256`
    is the identity of the artifact it was trained on, None where neither file says.
    """

    raw: Mapping[str, Any]
    peft_type: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    connection: str
    pooled: bool
    block_size: int | None
    statistics: str | None
    base_sha256: str | None
    modules_to_save: tuple[str, ...]

    @property
    def kind(self) -> AdapterKind:
        """As `finetune --lora` names it."""
        return kind_of(self.raw)

    def rank_of(self, module: str) -> int:
        """The rank of `module` after `rank_pattern`."""
        return int(_pattern(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA, after both patterns."""
        rank = self.rank_of(module)
        alpha = _pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def is_saved(self, tensor: str, module: str | None = None) -> bool:
        """Whether `tensor` belongs to one of `modules_to_save` (or to `module` of them)."""
        wanted = self.modules_to_save if module is None else (module,)
        parts = tensor.split(".")
        owners = [".".join(parts[:n]) for n in range(1, len(parts))]
        return any(owner.endswith(name) for owner in owners for name in wanted)

    def targets(self, module: str) -> bool:
        """Whether training adapted `module`, by PEFT's rule."""
        excluded = self.raw.get("exclude_modules")
        if excluded and _named(excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        wanted = self.raw.get("target_modules") or []
        if not _named(wanted, module):
            return False
        # A whole name, or one expression, is not bound to the layers that are counted.
        return isinstance(wanted, str) or module in wanted or self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        """`layers_to_transform` and `layers_pattern`, which count the layers to adapt."""
        layers = self.raw.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        names = self.raw.get("layers_pattern") or []
        names = [names] if isinstance(names, str) else names
        rules = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((m for rule in rules if (m := re.match(rule, module))), None)
        if found is None:
            return False
        return int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _named(names: Any, module: str) -> bool:
    """PEFT's two ways to name modules: one expression for the whole name, or a list of ends."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern(patterns: Mapping[str, Any], module: str, default: float) -> float:
    """The value of the first pattern that ends the module's name, as PEFT looks it up."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return default


def read_config(folder: Path) -> StoredConfig:
    """Read and check the settings in `folder`.

    Raises `UsageError`, naming the key, for a type or an option that cannot be merged, `IrqError`
    when the file is no such object or a value makes no sense.
    """
    path = folder / CONFIG_FILE
    raw = read_json_object(path)
    _refuse(path, raw)
    iec = raw["peft_type"] == IEC_LORA
    config = StoredConfig(
        raw=raw,
        peft_type=raw["peft_type"],
        rank=_rank(path, raw),
        alpha=float(_value(path, raw, "lora_alpha", (int, float))),
        rank_pattern=_numbers(path, raw, "rank_pattern"),
        alpha_pattern=_numbers(path, raw, "alpha_pattern"),
        use_rslora=bool(raw.get("use_rslora")),
        connection=raw.get("connection", "both") if iec else "none",
        pooled=iec and raw.get("pool") is not None,
        block_size=raw.get("block_size") if iec else None,
        statistics=raw.get("statistics") if iec else None,
        base_sha256=_base_hash(folder, raw),
        modules_to_save=tuple(_names(path, raw, "modules_to_save")),
    )
    _check(path, config)
    return config


def _refuse(path: Path, raw: Mapping[str, Any]) -> None:
    kind = raw.get("peft_type")
    if kind not in (LORA, IEC_LORA):
        raise UsageError(f"{path}: peft_type {kind!r} cannot be merged: only LORA and IEC_LORA can")
    if raw.get("bias", "none") != "none":
        raise UsageError(
            f"{path}: bias {raw['bias']!r}: biases of the base were trained too, which cannot be "
            "merged; train with bias 'none'"
        )
    initial = raw.get("init_lora_weights", True)
    if initial not in _INITIAL:
        raise UsageError(
            f"{path}: init_lora_weights {initial!r} changes the base before training, so the "
            "adapter does not belong to the artifact; convert it to a plain LoRA with PEFT first"
        )
    for key, value in raw.items():
        if key not in _NEUTRAL and value:
            raise UsageError(f"{path}: {key} {value!r} cannot be merged: only linear LoRA can")


def _rank(path: Path, raw: Mapping[str, Any]) -> int:
    """The rank; 0, which PEFT does not know, for statistics alone."""
    alone = raw["peft_type"] == IEC_LORA and raw.get("statistics") is not None
    if alone and type(raw.get("r")) is int and raw["r"] == 0:
        return 0
    return int(_value(path, raw, "r", int))


def _value(path: Path, raw: Mapping[str, Any], key: str, kinds: Any) -> Any:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise IrqError(f"{path}: {key} {value!r} must be a positive number")
    return value


def _numbers(path: Path, raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    values = raw.get(key) or {}
    if not isinstance(values, dict):
        raise IrqError(f"{path}: {key} must be an object, not {values!r}")
    for name in values:
        _value(path, values, name, int if key == "rank_pattern" else (int, float))
    return values


def _names(path: Path, raw: Mapping[str, Any], key: str) -> list[str]:
    """A list of names that say something; none where the key is missing, null or empty."""
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise IrqError(f"{path}: {key} {value!r} must be a list of names")
    return value


def _check_layers(path: Path, raw: Mapping[str, Any]) -> None:
    """`layers_to_transform` is a number or a list of them, `layers_pattern` a name or a list."""
    layers: Any = raw.get("layers_to_transform")
    each = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(number) is int for number in each):
        raise IrqError(f"{path}: layers_to_transform {layers!r} must be a list of layer numbers")
    if not isinstance(raw.get("layers_pattern"), str):
        _names(path, raw, "layers_pattern")


def _base_hash(folder: Path, raw: Mapping[str, Any]) -> str | None:
    """What the adapter belongs to: by its settings, else by the note beside them."""
    found = raw.get("base_sha256")
    note = folder / NOTE_FILE
    if found is None and note.is_file():
        base = read_json_object(note).get("base")
        found = base.get("sha256") if isinstance(base, dict) else None
    if found is not None and not isinstance(found, str):
        raise IrqError(f"{folder}: base hash {found!r} must be a string")
    return found


def _check(path: Path, config: StoredConfig) -> None:
    if config.connection not in set(Connection):
        known = ", ".join(Connection)
        raise IrqError(f"{path}: connection {config.connection!r} must be one of {known}")
    if config.raw.get("pool") not in (None, "block"):
        raise IrqError(f"{path}: pool {config.raw['pool']!r} must be 'block' or null")
    if config.statistics not in (None, *Statistics):
        known = ", ".join(Statistics)
        raise IrqError(f"{path}: statistics {config.statistics!r} must be one of {known} or null")
    if config.block_size is not None and config.block_size not in BLOCK_SIZES:
        raise IrqError(f"{path}: block_size {config.block_size!r} must be one of {BLOCK_SIZES}")
    _check_layers(path, config.raw)
    check_tokens(path, config.raw)
    patterns = [*config.rank_pattern, *config.alpha_pattern, *config.modules_to_save]
    layers: Any = config.raw.get("layers_pattern") or []
    patterns += [layers] if isinstance(layers, str) else layers
    for key in ("target_modules", "exclude_modules"):
        value: Any = config.raw.get(key) or []
        whole = isinstance(value, str)
        if not whole and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise IrqError(f"{path}: {key} {value!r} must be a string or a list of strings")
        patterns += [value] if whole else []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise IrqError(f"{path}: {pattern!r} is not a regular expression: {error}") from None
