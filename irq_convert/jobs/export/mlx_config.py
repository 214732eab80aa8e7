"""config.json as mlx-lm reads it: the quantization of every module, and rope where it looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

MIXTURES = {"mixtral": "each", "olmoe": "each", "granitemoe": "stacked"}
"""Mixtures that were loaded and compared, and how their files hold experts."""
TRIED = ("llama", "mistral", "qwen2", "qwen3", *MIXTURES)
"""Model types that were loaded and compared."""


def mlx_config(
    config: Mapping[str, Any], formats: Mapping[str, tuple[int, int] | None]
) -> dict[str, Any]:
    """The dense model's `config` with the key `quantization`.

    `formats` are bits and group size by module, None for linear modules that stay dense. The most
    frequent pair is the top level's, others are named one by one; embeddings and the head are
    quantized only where there are scales for them, which mlx-lm finds out itself. A copy under
    `quantization_config` is what mlx-lm writes, too.
    """
    counts = Counter(found for found in formats.values() if found is not None)
    default = counts.most_common(1)[0][0]
    quantization: dict[str, Any] = _settings(default)
    for module, found in formats.items():
        if found is None:
            quantization[module] = False
        elif found != default:
            quantization[module] = _settings(found)
    return {**with_rope(config), "quantization": quantization, "quantization_config": quantization}


def _settings(found: tuple[int, int]) -> dict[str, Any]:
    bits, group = found
    return {"group_size": group, "bits": bits, "mode": "affine"}


def with_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the rotary settings at the top level, where most of mlx-lm's classes look.

    transformers 5 writes them as `rope_parameters`; a class that does not find `rope_theta` would
    silently take its own default.
    """
    found = dict(config)
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return found
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope and config.get(key) is None:
            found[key] = rope[key]
    if rope.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
        found["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return found
