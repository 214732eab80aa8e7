"""Tiles on their way to the device and back: a ring of slots, and the engine that moves them.

A slot is memory for one tile, used again and again: where the disk is read into, and on a GPU its
copy on the device. The ring bounds how many tiles are under way. Three threads meet here: the
reader takes a slot, fills it and starts its upload; the search waits for the upload on the device
and gives the slot back when it is through; the writer fetches the result.
"""

from __future__ import annotations

import functools
import queue
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

from irq_convert.core.quantized import QuantizedTensor

SLOTS = 4
"""One tile read, one searched, and two waiting in between."""
_POLL = 0.1


class RingClosed(Exception):
    """The ring was closed while somebody waited for a slot: nobody wants the tile any more."""


@dataclass
class Slot:
    """Memory of one tile: bytes on the host and, where the engine needs it, on the device."""

    host: torch.Tensor
    device: torch.Tensor | None = None
    uploaded: Any = None


class Engine:
    """Moves tiles with plain copies, which return when they are done.

    On the CPU a tile is searched where it was read, and nothing is copied. Other devices without
    an engine of their own are served here too, one step after the other.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def memory(self, nbytes: int) -> torch.Tensor:
        """Host memory to read into, uint8 `[nbytes]`."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def upload(self, slot: Slot, tile: torch.Tensor) -> torch.Tensor:
        """Start to move `tile`, in host memory, to the device (reader's thread)."""
        return tile if self.device.type == "cpu" else tile.to(self.device)

    def ready(self, slot: Slot) -> None:
        """Let what the searching thread does from now on see the slot's upload."""

    def mark(self) -> Any:
        """A point in the searching thread's work that `fetch` waits for."""
        return None

    def fetch(self, tile: QuantizedTensor, mark: Any) -> QuantizedTensor:
        """`tile` on the host, computed up to `mark` (writer's thread)."""
        return _map(tile, lambda part: part.cpu())


class CudaEngine(Engine):
    """Uploads and downloads on streams of their own, through pinned memory, beside the search."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        super().__init__(torch.device("cuda", index))
        self._up, self._down = _streams(index)

    def memory(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def upload(self, slot: Slot, tile: torch.Tensor) -> torch.Tensor:
        if not tile.is_pinned():
            tile = room(self, slot, tuple(tile.shape), tile.dtype).copy_(tile)
        with torch.cuda.stream(self._up):
            if slot.device is None or slot.device.numel() < tile.nbytes:
                slot.device = torch.empty(tile.nbytes, dtype=torch.uint8, device=self.device)
            moved = slot.device[: tile.nbytes].view(tile.dtype).view(tile.shape)
            moved.copy_(tile, non_blocking=True)
            slot.uploaded = self._up.record_event()
        return moved

    def ready(self, slot: Slot) -> None:
        torch.cuda.current_stream(self.device).wait_event(slot.uploaded)

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def fetch(self, tile: QuantizedTensor, mark: Any) -> QuantizedTensor:
        def copy(part: torch.Tensor) -> torch.Tensor:
            host = torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=True)
            return host.copy_(part, non_blocking=True)

        with torch.cuda.stream(self._down):
            self._down.wait_event(mark)
            found = _map(tile, copy)
        self._down.synchronize()
        return found


@functools.cache
def _streams(index: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Where a GPU's uploads and downloads run, the same for every shard.

    The allocator gives freed memory only to the stream that it was allocated on.
    """
    device = torch.device("cuda", index)
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Ring:
    """`slots` slots; `take` waits for a free one. Leaving the block wakes whoever waits."""

    def __init__(self, engine: Engine, slots: int = SLOTS) -> None:
        self.engine = engine
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._closed = threading.Event()
        for _ in range(slots):
            self._free.put(Slot(torch.empty(0, dtype=torch.uint8, device="cpu")))

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closed.set()

    def take(self) -> Slot:
        """A slot that nobody uses; `RingClosed` when the ring is closed instead."""
        while not self._closed.is_set():
            try:
                return self._free.get(timeout=_POLL)
            except queue.Empty:
                continue
        raise RingClosed

    def give(self, slot: Slot) -> None:
        """The slot's tile is not needed any more, on the host nor on the device."""
        self._free.put(slot)

    def room(self, slot: Slot, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The slot's host memory as a tensor to read into."""
        return room(self.engine, slot, shape, dtype)


def room(engine: Engine, slot: Slot, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The slot's host memory, made larger where that is needed, as `shape` of `dtype`."""
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    if slot.host.numel() < nbytes:
        slot.host = engine.memory(nbytes)
    return slot.host[:nbytes].view(dtype).view(shape)


def make_engine(device: str | torch.device) -> Engine:
    """What moves tiles to `device` and back."""
    device = torch.device(device)
    return CudaEngine(device) if device.type == "cuda" else Engine(device)


def _map(tile: QuantizedTensor, change: Any) -> QuantizedTensor:
    names = ("codes", "scale", "tau", "scale_grid", "tau_grid")
    parts = {name: getattr(tile, name) for name in names}
    return replace(tile, **{name: change(p) for name, p in parts.items() if p is not None})
