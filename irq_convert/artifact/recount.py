"""The entropy of stored codes, counted again: the one loss that an artifact shows without a source.

Counted in tiles, and put together from the same table of integers as the quantizer's, so that the
figure is the manifest's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from irq_convert.artifact.checksums import THREADS
from irq_convert.artifact.contents import Artifact, read_part
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.artifact.structure import WAY_OUT, StoredTensor
from irq_convert.artifact.values import entropy_tolerance, tiles
from irq_convert.checkpoint.reader import TileReader
from irq_convert.core.packing import unpack_codes
from irq_convert.core.tensor_stats import TensorStats, entropy_sum
from irq_convert.version import PRODUCER

SAME = 1e-12
"""How far logarithms of two machines may be apart, as a part of a figure."""


def recount_entropy(tensor: StoredTensor) -> float:
    """Mean entropy of a code of `tensor`, bits: what the quantizer noted, from its codes alone.

    Memory is a tile's. Raises `IrqError` when a file cannot be read.
    """
    shape, total = tensor.shape, 0
    with TileReader() as reader:
        for start, stop in tiles(shape):
            packed = read_part(reader, tensor, "", start, stop)
            codes = unpack_codes(packed, shape.bits, shape.cols).numpy()
            total += entropy_sum(codes, shape)
    return TensorStats(shape, 0, total, np.zeros((0, 2))).entropy if tensor.weights else 0.0


def wrong_entropies(artifact: Artifact, left_out: frozenset[str]) -> Iterator[str]:
    """One line for each tensor of which the manifest notes another entropy than its codes have.

    Those with a part in one of the files `left_out` are not looked at. What this very program noted
    has to be the same; another writer may have taken logarithms otherwise (irq-v1, section 7).
    """
    manifest: Mapping[str, Any] = artifact.manifest or {"tensors": {}}
    looked_at = [
        tensor
        for tensor in artifact.quantized
        if tensor.name in manifest["tensors"]
        and not {part.shard.name for part in tensor.parts.values()} & left_out
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        for tensor, found in zip(looked_at, pool.map(recount_entropy, looked_at), strict=True):
            entry = manifest["tensors"][tensor.name]
            allowed = SAME if _is_own(manifest, entry) else entropy_tolerance(tensor.shape)
            if not math.isclose(entry["entropy"], found, rel_tol=SAME, abs_tol=allowed):
                yield (
                    f"{MANIFEST_NAME}: tensors[{tensor.name}] says entropy {entry['entropy']!r}, "
                    f"its codes have {found!r}: {WAY_OUT}"
                )


def _is_own(manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether this program has noted `entry`, and did not take it over from the base of a merge."""
    if manifest.get("producer") != PRODUCER:
        return False
    return "base" not in manifest["source"] or entry.get("merged") == "requantized"
