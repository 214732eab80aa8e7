"""How a checkpoint is cut into files: which tensor goes into which shard, and the index."""

from collections.abc import Mapping, Sequence
from typing import Any

INDEX_NAME = "model.safetensors.index.json"
"""The index that transformers reads when a checkpoint has more than one shard."""


def plan_shards(sizes: Sequence[tuple[str, int]], max_bytes: int) -> list[list[str]]:
    """Cut `(name, bytes)` pairs into shards of at most `max_bytes` each, keeping their order.

    Greedy: a shard is closed when the next tensor would not fit. A tensor larger than `max_bytes`
    gets a shard of its own. No tensors, no shards. Raises `ValueError` for a name given twice, a
    negative size or `max_bytes` below 1.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    if len({name for name, _ in sizes}) != len(sizes):
        raise ValueError("a tensor name is given twice")
    shards: list[list[str]] = []
    used = 0
    for name, size in sizes:
        if size < 0:
            raise ValueError(f"tensor {name!r}: negative size {size}")
        if not shards or used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def shard_name(number: int, count: int) -> str:
    """Return the file name of shard `number` (1 to `count`), as transformers names them."""
    if not 1 <= number <= count:
        raise ValueError(f"shard {number} of {count} does not exist")
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def build_index(weight_map: Mapping[str, str], total_size: int) -> dict[str, Any]:
    """Return the index object: tensor name to file name, sorted, and the bytes of all tensors."""
    return {
        "metadata": {"total_size": total_size},
        "weight_map": {name: weight_map[name] for name in sorted(weight_map)},
    }
