"""Tiles on their way to a device: the ring, and a conversion whose copies end late."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from irq_convert.checkpoint.reader import TileReader
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError
from irq_convert.jobs.quantize import pipeline
from irq_convert.jobs.quantize.device_tiles import (
    SLOTS,
    Engine,
    Ring,
    RingClosed,
    Slot,
    make_engine,
)
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.pipeline import quantize_shard
from irq_convert.progress import Progress

from .test_pipeline import plan_of, tensors_of

HOST = torch.device("cpu")


class LateEngine(Engine):
    """A device of its own memory whose copies run behind, one after the other, and take a while.

    What a GPU's copy engines do, with threads: whoever reads too early or reuses memory too early
    reads the wrong bytes.
    """

    def __init__(self, device: torch.device = HOST) -> None:
        super().__init__(device)
        self.up, self.down = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.most = self.under_way = 0

    def memory(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def upload(self, slot: Slot, tile: torch.Tensor) -> torch.Tensor:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        moved = torch.full_like(tile, float("nan"))

        def copy() -> None:
            time.sleep(0.002)
            moved.copy_(tile)

        slot.uploaded = self.up.submit(copy)
        return moved

    def ready(self, slot: Slot) -> None:
        slot.uploaded.result()
        self.under_way -= 1

    def mark(self) -> Future[None]:
        return self.down.submit(time.sleep, 0.001)

    def fetch(self, tile: QuantizedTensor, mark: Any) -> QuantizedTensor:
        mark.result()
        return super().fetch(tile, mark)


@pytest.mark.parametrize("tile_weights", [1, 20_000])
def test_late_copies_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile_weights: int
) -> None:
    options = QuantizeOptions(QuantSpec("nf3", 32), tile_weights=tile_weights)
    plan = plan_of(tmp_path / "m", tensors_of(torch.float32), options)
    for name in ("plain", "late"):
        (tmp_path / name).mkdir()
    expected = quantize_shard(plan.folder.shards[0], tmp_path / "plain", options, Progress())
    engine = LateEngine()
    monkeypatch.setattr(pipeline, "make_engine", lambda device: engine)
    stats = quantize_shard(plan.folder.shards[0], tmp_path / "late", options, Progress())
    name = plan.folder.shards[0].name
    assert (tmp_path / "late" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert stats.keys() == expected.keys()
    assert 1 <= engine.most <= SLOTS


def test_slots_are_few_and_used_again() -> None:
    ring = Ring(Engine(HOST), slots=2)
    with ring:
        first, second = ring.take(), ring.take()
        assert first is not second
        waiting = ThreadPoolExecutor(1).submit(ring.take)
        assert not waiting.done()
        ring.give(first)
        assert waiting.result() is first


def test_closing_wakes_whoever_waits_for_a_slot() -> None:
    ring = Ring(Engine(HOST), slots=1)
    ring.take()
    waiting = ThreadPoolExecutor(1).submit(ring.take)
    ring.__exit__()
    with pytest.raises(RingClosed):
        waiting.result()


def test_memory_grows_to_the_largest_tile_and_stays() -> None:
    ring = Ring(Engine(HOST), slots=1)
    slot = ring.take()
    large = ring.room(slot, (4, 6), torch.float32)
    assert large.shape == (4, 6)
    assert large.is_contiguous()
    small = ring.room(slot, (3, 5), torch.bfloat16)
    assert small.dtype == torch.bfloat16
    assert small.data_ptr() == large.data_ptr()
    assert ring.room(slot, (5, 6), torch.float32).nbytes > large.nbytes


def test_the_cpu_copies_nothing() -> None:
    engine = make_engine("cpu")
    slot, tile = Slot(torch.empty(0)), torch.ones(2, 3)
    assert type(engine) is Engine
    assert engine.upload(slot, tile) is tile
    assert engine.fetch(_quantized(tile), engine.mark()).codes.data_ptr() == tile.data_ptr()


def test_other_devices_get_plain_copies() -> None:
    tile = torch.ones(2, 3)
    assert Engine(torch.device("meta")).upload(Slot(torch.empty(0)), tile).device.type == "meta"


def _quantized(codes: torch.Tensor) -> QuantizedTensor:
    grid = torch.ones(1, 2)
    return QuantizedTensor(codes, codes, codes, grid, None, 3, "nf4", 16)


def test_a_failing_search_does_not_wait_for_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has filled every slot and waits for another when the search gives up."""
    options = QuantizeOptions(tile_weights=1)
    plan = plan_of(tmp_path / "m", tensors_of(torch.float32), options)
    begun, real = threading.Semaphore(0), TileReader.read_rows

    def read(*args: Any, **kwargs: Any) -> torch.Tensor:
        begun.release()
        return real(*args, **kwargs)

    def fail(*args: Any, **kwargs: Any) -> None:
        for _ in range(3):  # one tile is searched, two wait: the queue is full
            begun.acquire()
        raise IrqError("the device is gone")

    monkeypatch.setattr(TileReader, "read_rows", read)
    monkeypatch.setattr(pipeline, "quantize_with_stats", fail)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(IrqError, match="gone"):
        quantize_shard(plan.folder.shards[0], out, options, Progress())
    assert not list(out.iterdir())
    assert not [t for t in threading.enumerate() if t.name.startswith(("irq-reader", "irq-writer"))]
