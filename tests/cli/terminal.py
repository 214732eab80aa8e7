"""What a program shows at a terminal."""

from __future__ import annotations

import os
import select
import time


def until(terminal: int, end: str, after: str = "") -> str:
    """What the terminal shows until `end` comes, once `after` was there."""
    seen, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
            if after in seen and end in seen[seen.index(after) :]:
                return seen
    raise AssertionError(f"no {end!r} in {seen!r}")
