"""Under torchrun, one process speaks for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from irq_convert.errors import IrqError


def speaks() -> bool:
    """Whether this is the process that prints: the only one, or the first of torchrun's."""
    from irq_convert.jobs.ranks import Ranks

    return Ranks.from_environment().first


@contextmanager
def one_voice(same: bool = False) -> Iterator[None]:
    """Run the block; a failure that another process tells ends this one without a word.

    `same` is for what all processes do alike, so that the first one fails as the others do.
    """
    from irq_convert.jobs.meeting import Told

    try:
        yield
    except Told as error:
        raise typer.Exit(error.exit_code) from None
    except IrqError as error:
        if same and not speaks():
            raise typer.Exit(error.exit_code) from None
        raise
