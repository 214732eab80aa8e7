"""The report of a run, from the process that has made it to the others: in JSON, never pickled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from irq_convert.errors import IrqError
from irq_convert.jobs.common.torchrun import RunProcesses

T = TypeVar("T")


def run_once(processes: RunProcesses, kind: type[T], work: Callable[[], T]) -> T:
    """Do `work`, which is not shared out, in the first process; returns its result in all.

    `kind` is a dataclass as `unpack` takes it.
    """
    if not processes.ranks.first:
        return receive_result(processes, kind)
    result = work()
    broadcast_result(processes, result)
    return result


def broadcast_result(processes: RunProcesses, result: object) -> None:
    """Give the others the result; the store may live in this process, so wait until they have.

    What fails now fails in the others: the result is whole.
    """
    if processes.ranks.alone:
        return
    with contextlib.suppress(IrqError):
        processes.put("result", pack(result))
        processes.wait(
            lambda: all(processes.has(f"read/{n}") for n in range(1, processes.ranks.count))
        )


def receive_result(processes: RunProcesses, kind: type[T]) -> T:
    """The result, from the first process; raises when the run fails meanwhile."""
    result = unpack(kind, processes.take("result"))
    processes.put(f"read/{processes.ranks.rank}", b"")
    return result


def pack(result: Any) -> bytes:
    """A dataclass as JSON."""
    return json.dumps(asdict(result)).encode()


def unpack(kind: type[T], data: bytes) -> T:
    """What `pack` was given: dataclasses, tuples of one type and optional ones of these in fields.

    All other fields are as JSON gives them back.
    """
    found: T = _as(kind, json.loads(data))
    return found


def _as(kind: Any, value: Any) -> Any:
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _as(hints[name], each) for name, each in value.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        return tuple(_as(get_args(kind)[0], each) for each in value)
    inner = [each for each in get_args(kind) if is_dataclass(each)]
    return _as(inner[0], value) if inner and value is not None else value
