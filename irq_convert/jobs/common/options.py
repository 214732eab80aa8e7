"""What the options of jobs have in common: defaults, checks, and how keywords become options."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar

from irq_convert.errors import UsageError

MAX_SHARD_BYTES = 5_000_000_000
"""Of an output file, unless a single tensor is larger."""

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)


def option_name(field: str) -> str:
    """`learning_rate` to `--learning-rate`."""
    return f"--{field.replace('_', '-')}"


def check_sizes(threads: int | None, max_shard_bytes: int, tile_weights: int) -> None:
    """Raise `UsageError` for a number of threads, bytes or weights below 1."""
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: at least 1")
    if max_shard_bytes < 1:
        raise UsageError(f"a shard of {max_shard_bytes} bytes holds nothing: at least 1")
    if tile_weights < 1:
        raise UsageError(f"tiles of {tile_weights} weights: at least 1")


def as_choice(kind: type[E], value: str, field: str) -> E:
    """The member of `kind` that `value` names; `UsageError` lists all of them otherwise."""
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(kind)
        raise UsageError(f"{option_name(field)} {value}: choose one of {known}") from None


def fix_choices(options: Any, **kinds: type[StrEnum]) -> None:
    """Make plain strings in a frozen dataclass the members they name; None stays None.

    So that a notebook may say `to="dense"`. Raises `UsageError` as `as_choice`.
    """
    for field, kind in kinds.items():
        value = getattr(options, field)
        if value is not None:
            object.__setattr__(options, field, as_choice(kind, value, field))


def chosen(kind: Callable[..., T], options: T | None, settings: dict[str, Any]) -> T:
    """`options`, else those that the keywords `settings` make, else the defaults.

    Raises `UsageError` when both are given, and as `kind` does.
    """
    if options is None:
        return kind(**settings)
    if settings:
        given = ", ".join(sorted(settings))
        raise UsageError(f"{given}: give either options or single settings, not both")
    return options
