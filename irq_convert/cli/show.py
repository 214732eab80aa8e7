"""How commands print: aligned facts, human sizes and times."""

from __future__ import annotations

from collections.abc import Iterable


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Print `label   value` lines; long values are not broken, so that paths can be copied."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for label, value in rows:
        console.print(Text(f"{label:<16} ", style="bold") + Text(value), soft_wrap=True)


def resume_rows(finished: int, shards: int) -> list[tuple[str, str]]:
    """What a dry run says of shards that an earlier run has left; nothing where there are none."""
    return [("would resume", f"{finished} of {shards} shards are there")] if finished else []


def gigabytes(count: int) -> str:
    """Bytes in the unit that reads best, powers of ten."""
    # A unit begins where the one below would be rounded to 1000.00.
    for unit, size, first in (("GB", 1e9, 999.995e6), ("MB", 1e6, 999.995e3), ("kB", 1e3, 1e3)):
        if count >= first:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def seconds(value: float) -> str:
    """`95.2` to `1 min 35 s`."""
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
