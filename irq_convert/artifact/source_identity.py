"""Which dense model something was made from, so that it is not used with another."""

from __future__ import annotations

import hashlib
from typing import Any

from irq_convert.artifact.manifest import describe_source
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import Checkpoint

_SAMPLE = 4096
"""Bytes of each tensor that tell apart local models of the same name and shapes."""


def source_identity(checkpoint: Checkpoint, model: str) -> dict[str, Any]:
    """The source as a manifest tells it, and of a local folder a hash of some of its weights."""
    source = describe_source(checkpoint, model)
    if checkpoint.revision is not None:
        return source
    digest = hashlib.sha256()
    with TileReader() as reader:
        for _, info in sorted(checkpoint.tensors.items()):
            digest.update(bytes(next(reader.iter_bytes(info, _SAMPLE), b"")))
    return {**source, "sample_sha256": digest.hexdigest()}
