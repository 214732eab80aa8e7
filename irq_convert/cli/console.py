"""What commands do at the console: who speaks, what is printed, and how it looks.

Under torchrun one process speaks for all; libraries below are kept quiet, since what matters of
what they say is an error of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer

from irq_convert.errors import IrqError
from irq_convert.progress import Progress


def is_main_process() -> bool:
    """Whether this is the process that prints: the only one, or the first of torchrun's."""
    from irq_convert.jobs.common.ranks import Ranks

    return Ranks.from_environment().first


@contextmanager
def main_process_only(same: bool = False) -> Iterator[None]:
    """Run the block; a failure that another process tells ends this one without a word.

    `same` is for what all processes do alike, so that the first one fails as the others do.
    """
    from irq_convert.jobs.common.torchrun import FailedElsewhere

    try:
        yield
    except FailedElsewhere as error:
        raise typer.Exit(error.exit_code) from None
    except IrqError as error:
        if same and not is_main_process():
            raise typer.Exit(error.exit_code) from None
        raise


def quiet_libraries(threads: int | None = None) -> None:
    """No progress bars, notes or warnings of theirs; also sets torch's CPU threads if given."""
    import logging
    import warnings

    import torch
    from transformers.utils import logging as transformers_logging

    if threads is not None:
        torch.set_num_threads(threads)
    libraries = r"(transformers|peft|accelerate|torch|bitsandbytes)\b"
    warnings.filterwarnings("ignore", module=libraries)
    for name in ("bitsandbytes", "torch.distributed", "accelerate", "lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


class StageLines(Progress):
    """Progress in words, where a library below draws bars; stages only on a terminal."""

    def stage(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"irq-convert: {text}", file=sys.stderr)

    def note(self, text: str) -> None:
        print(f"irq-convert: {text}", file=sys.stderr)


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
