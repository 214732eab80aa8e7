"""Rules by regular expressions over the names of weights."""

from __future__ import annotations

import re
from collections.abc import Sequence

from irq_convert.errors import UsageError


def check_expression(option: str, pattern: str) -> None:
    """Raise `UsageError` naming `option` for a `pattern` that is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{option} {pattern!r} is not a regular expression: {error}") from None


def last_match(rules: Sequence[tuple[str, int]], name: str) -> int | None:
    """What the last of `rules` says whose expression is found in `name`; None where none is."""
    found = None
    for pattern, value in rules:
        if re.search(pattern, name):
            found = value
    return found
