"""How much memory a job may take, and how much a check of logits would."""

from __future__ import annotations

import os
from pathlib import Path

from irq_convert.artifact.contents import Artifact

_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
_SPARE = 1_000_000_000
"""Beside the weights: activations, one expanded layer, the libraries."""


def available_memory() -> int:
    """Bytes that can be taken now, by the system's word and that of a container's limit."""
    free = _system()
    for limit, used in _LIMITS:
        try:
            free = min(free, int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return max(0, free)


def _system() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return 0


def logits_memory(artifact: Artifact, dense: bool) -> int:
    """Bytes that comparing logits takes at its peak: one model after the other, in float32."""
    copied = sum(info.numel for info in artifact.copied)
    packed = artifact.quantized_bytes + 4 * copied
    return max(packed, 4 * artifact.weights if dense else packed) + _SPARE
