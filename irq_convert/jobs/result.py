"""The report of a run, from the process that has made it to the others: in JSON, never pickled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from irq_convert.errors import IrqError
from irq_convert.jobs.meeting import Meeting

T = TypeVar("T")


def run_once(meeting: Meeting, kind: type[T], work: Callable[[], T]) -> T:
    """Do `work`, which is not shared out, in the first process; returns its result in all.

    `kind` is a dataclass as `unpack` takes it.
    """
    if not meeting.ranks.first:
        return hear(meeting, kind)
    result = work()
    tell(meeting, result)
    return result


def tell(meeting: Meeting, result: object) -> None:
    """Give the others the result; the store may live in this process, so wait until they have.

    What fails now fails in the others: the result is whole.
    """
    if meeting.ranks.alone:
        return
    with contextlib.suppress(IrqError):
        meeting.put("result", pack(result))
        meeting.wait(lambda: all(meeting.has(f"read/{n}") for n in range(1, meeting.ranks.count)))


def hear(meeting: Meeting, kind: type[T]) -> T:
    """The result, from the first process; raises when the run fails meanwhile."""
    result = unpack(kind, meeting.take("result"))
    meeting.put(f"read/{meeting.ranks.rank}", b"")
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
