"""The header of a safetensors file on the Hub, without its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from irq_convert.checkpoint.header import header_length, parse_header

_FIRST_READ = 1 << 20  # most headers fit, so one request a file is enough


def fetch_header(fetch: Callable[[int, int], bytes], path: Path, size: int) -> bytes:
    """The first 8 + N bytes of a safetensors file of `size` bytes, checked.

    `fetch` gives bytes `start` to `stop` of it. Raises `IrqError` as `read_header`.
    """
    head = fetch(0, min(_FIRST_READ, size))
    stop = 8 + header_length(path, head)
    if stop > len(head):
        head += fetch(len(head), stop)
    head = head[:stop]
    parse_header(path, head[8:], size)
    return head
