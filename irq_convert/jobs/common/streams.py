"""Two small tools that let reading, searching and writing overlap with bounded memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


@contextmanager
def prefetched(items: Iterable[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """Iterate over `items` while a thread produces up to `depth` of them ahead.

    An exception of the producer is raised where its item would have been. Leaving the block
    early stops the thread.
    """
    ready: queue.Queue[object] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: object) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(item):
                    return
            put(_END)
        except BaseException as error:
            put(_Failure(error))

    def consume() -> Iterator[T]:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item  # type: ignore[misc]

    thread = threading.Thread(target=produce, name="irq-reader", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stopped.set()
        thread.join()


class _Failure(Generic[T]):
    def __init__(self, error: BaseException) -> None:
        self.error = error


class BackgroundWriter:
    """Run calls in order on one thread, at most `depth` waiting; errors surface at the next."""

    def __init__(self, depth: int = 4) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="irq-writer")
        self._slots = threading.BoundedSemaphore(depth)
        self._failed: Future[None] | None = None

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._raise()

    def submit(self, call: Callable[..., None], *args: object) -> None:
        """Queue `call(*args)`; waits while the queue is full."""
        self._raise()
        self._slots.acquire()

        def run() -> None:
            if self._failed is None:
                call(*args)

        future = self._pool.submit(run)
        future.add_done_callback(self._done)

    def _done(self, future: Future[None]) -> None:
        self._slots.release()
        if not future.cancelled() and future.exception() is not None and self._failed is None:
            self._failed = future

    def _raise(self) -> None:
        if self._failed is not None:
            self._failed.result()
