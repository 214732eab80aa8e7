"""The two tools of the stream: order, bounds, errors, and threads that end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from irq_convert.jobs.common.streams import BackgroundWriter, prefetched


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [
        t
        for t in set(threading.enumerate()) - before
        if t.name.startswith(("irq-reader", "irq-writer", "irq-checksum"))
    ]
    assert not left


def wait_until(condition: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_items_come_in_order(depth: int) -> None:
    with prefetched(range(50), depth) as items:
        assert list(items) == list(range(50))
    with prefetched([], depth) as items:
        assert list(items) == []
    with prefetched([None, None], depth) as items:
        assert list(items) == [None, None]


def test_production_is_ahead_but_bounded() -> None:
    made: list[int] = []

    def produce() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    with prefetched(produce(), 2) as items:
        wait_until(lambda: len(made) == 3)  # two ready, one waiting to be put
        time.sleep(0.3)
        assert made == [0, 1, 2]
        assert next(items) == 0
        wait_until(lambda: len(made) == 4)
        time.sleep(0.3)
        assert made == [0, 1, 2, 3]


def test_an_error_comes_where_its_item_would_have() -> None:
    def produce() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk")

    seen: list[int] = []
    with pytest.raises(OSError, match="disk"), prefetched(produce(), 5) as items:
        seen.extend(items)  # keeps what came before the error
    assert seen == [1, 2]


def test_leaving_early_stops_the_producer() -> None:
    closed = threading.Event()

    def produce() -> Iterator[int]:
        try:
            number = 0
            while True:
                yield number
                number += 1
        finally:
            closed.set()

    with pytest.raises(KeyError), prefetched(produce()) as items:  # noqa: PT012
        assert next(items) == 0
        raise KeyError
    assert closed.wait(5)


def test_calls_run_in_order_behind() -> None:
    done: list[int] = []
    with BackgroundWriter(3) as behind:
        for number in range(100):
            behind.submit(done.append, number)
    assert done == list(range(100))


def test_the_queue_is_bounded() -> None:
    gate, queued = threading.Event(), []

    def fill(behind: BackgroundWriter) -> None:
        for number in range(6):
            behind.submit(gate.wait, 10)  # type: ignore[arg-type]
            queued.append(number)

    with BackgroundWriter(3) as behind:
        filler = threading.Thread(target=fill, args=(behind,))
        filler.start()
        wait_until(lambda: len(queued) == 3)
        time.sleep(0.2)
        assert len(queued) == 3
        gate.set()
        filler.join(10)
    assert len(queued) == 6


def fail() -> None:
    raise OSError("full")


def test_an_error_surfaces_at_the_next_call_and_nothing_runs_after_it() -> None:
    done: list[int] = []

    def submit_until_it_raises() -> None:
        with BackgroundWriter(1) as behind:
            behind.submit(fail)
            for number in range(100):
                behind.submit(done.append, number)
                time.sleep(0.01)

    with pytest.raises(OSError, match="full"):
        submit_until_it_raises()
    assert done == []


def test_calls_that_wait_behind_an_error_do_not_run() -> None:
    gate, done = threading.Event(), list[int]()

    def fail_late() -> None:
        gate.wait(10)
        raise OSError("full")

    with pytest.raises(OSError, match="full"), BackgroundWriter(4) as behind:  # noqa: PT012
        behind.submit(fail_late)
        behind.submit(done.append, 1)
        behind.submit(done.append, 2)
        gate.set()
    assert done == []


def test_an_error_of_the_last_call_surfaces_at_the_end() -> None:
    with pytest.raises(OSError, match="full"), BackgroundWriter() as behind:
        behind.submit(fail)


def test_the_first_error_of_the_block_wins_and_waiting_calls_are_dropped() -> None:
    gate, done = threading.Event(), []

    def slow() -> None:
        gate.wait(10)
        done.append(0)

    with pytest.raises(KeyError), BackgroundWriter(4) as behind:  # noqa: PT012
        behind.submit(slow)
        behind.submit(fail)
        behind.submit(done.append, 1)
        threading.Timer(0.1, gate.set).start()
        raise KeyError
    assert done == [0]
