"""`quantization_config` of compressed-tensors, as that package, transformers and vLLM read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kept:
    """Bits and group size of a quantized module."""

    bits: int
    group: int


def packed_config(
    config: Mapping[str, Any], modules: Mapping[str, Kept], ignored: Sequence[str]
) -> dict[str, Any]:
    """The dense model's `config` with a `quantization_config` of format pack-quantized.

    Modules that are stored alike are one group; a single one is said to be all linear layers but
    the `ignored`, several name their modules. `dequantize` tells transformers to decode while it
    loads: otherwise it expects zero points unpacked and refuses the file.
    """
    alike: dict[Kept, list[str]] = {}
    for module, kept in modules.items():
        alike.setdefault(kept, []).append(module)
    ordered = sorted(alike.items(), key=lambda item: (-len(item[1]), item[0].bits, item[0].group))
    groups = {
        f"group_{at}": _scheme(kept, ["Linear"] if len(ordered) == 1 else names)
        for at, (kept, names) in enumerate(ordered)
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(set(ignored)),
        "dequantize": True,
    }
    return {**config, "quantization_config": quantization}


def _scheme(kept: Kept, targets: Sequence[str]) -> dict[str, Any]:
    return {
        "targets": list(targets),
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": kept.bits,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": kept.group,
            "dynamic": False,
        },
    }
