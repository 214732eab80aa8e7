"""Which of torchrun's processes this is, and which shards are its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from irq_convert.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This is process `rank` of `count`, `local` of `beside` on its host; alone by default."""

    rank: int = 0
    count: int = 1
    local: int = 0
    beside: int = 1

    @classmethod
    def from_environment(cls) -> Self:
        """As torchrun has set it; alone when it has not."""
        found = [os.environ.get(n, "") for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
        if not all(text.isdigit() for text in found):
            return cls()
        rank, count, local = map(int, found)
        if not rank < count:
            raise UsageError(f"RANK {rank} of WORLD_SIZE {count}: start the processes by torchrun")
        beside = os.environ.get("LOCAL_WORLD_SIZE", "")
        return cls(rank, count, local, int(beside) if beside.isdigit() else 1)

    @property
    def first(self) -> bool:
        """Whether this one speaks, and writes what is written once."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.count == 1

    def device(self, asked: str) -> str:
        """The torch device of this process: with torchrun, each has a GPU of its own.

        Raises `UsageError` when one GPU is named for several processes.
        """
        if self.alone or not asked.startswith("cuda"):
            return asked
        if ":" in asked:
            raise UsageError(f"--device {asked}: torchrun gives each process its own; say cuda")
        return f"cuda:{self.local}"

    def threads(self, asked: int | None) -> int | None:
        """CPU threads of this process: as asked, else its part of the host's."""
        if asked is not None or self.alone:
            return asked
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return max(1, (cores or 1) // max(1, self.beside))


def split(sizes: Sequence[int], count: int) -> list[range]:
    """Cut `sizes` into `count` runs of neighbours, the largest sum as small as it can be.

    Neighbours, because they read the same files of the source. The same for the same numbers
    everywhere; with fewer sizes than parts some are empty. Raises `ValueError` for a `count` below
    1 or a negative size.
    """
    if count < 1 or any(size < 0 for size in sizes):
        raise ValueError(f"cannot cut {len(sizes)} sizes into {count} parts")
    low, high = max(sizes, default=0), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if _parts_needed(sizes, 0, middle) <= count:
            high = middle
        else:
            low = middle + 1
    parts, start, rest = [], 0, sum(sizes)
    for left in range(count, 0, -1):
        stop, size = start, 0
        while stop < len(sizes) and size + sizes[stop] <= low:
            near = (2 * size + sizes[stop]) * left <= 2 * rest  # nearer to an equal share with it
            if not near and _parts_needed(sizes, stop, low) <= left - 1:
                break
            size += sizes[stop]
            stop += 1
        parts.append(range(start, stop))
        start, rest = stop, rest - size
    return parts


def _parts_needed(sizes: Sequence[int], start: int, limit: int) -> int:
    """Runs that `sizes` from `start` on take when each is as long as `limit` allows."""
    count, room = 0, -1
    for size in sizes[start:]:
        if size > room:
            count, room = count + 1, limit
        room -= size
    return count
