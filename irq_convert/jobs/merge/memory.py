"""How much memory a check of logits would take."""

from __future__ import annotations

from irq_convert.artifact.contents import Artifact
from irq_convert.jobs.common.memory import available_memory

__all__ = ["available_memory", "logits_memory"]

_SPARE = 1_000_000_000
"""Beside the weights: activations, one expanded layer, the libraries."""


def logits_memory(artifact: Artifact, dense: bool) -> int:
    """Bytes that comparing logits takes at its peak: one model after the other, in float32."""
    copied = sum(info.numel for info in artifact.copied)
    packed = artifact.quantized_bytes + 4 * copied
    return max(packed, 4 * artifact.weights if dense else packed) + _SPARE
