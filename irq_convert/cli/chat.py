"""A conversation at the terminal: with one model, or with two that answer side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from irq_convert.cli.generate_show import figures, show
from irq_convert.errors import UsageError
from irq_convert.jobs.generate.generate import begin, opening, report_of

if TYPE_CHECKING:
    from irq_convert.jobs.generate.models import Writer
    from irq_convert.jobs.generate.options import GenerateOptions
    from irq_convert.jobs.generate.prompt import Message
    from irq_convert.jobs.generate.stream import TextStream


def talk_with(writers: Sequence[Writer], system: str | None, options: GenerateOptions) -> None:
    """Ask for a message, show the answer, and so on until the end of input.

    Each model remembers its own answers. Ctrl-C stops an answer, and what there is of it stays.
    Raises as `begin`, so for a template that is missing with the first message.
    """
    typer.echo("Ctrl-C stops an answer, Ctrl-D ends the conversation.", err=True)
    said: list[list[Message]] = [[] for _ in writers]
    while (message := _ask()) is not None:
        before = any(said)
        for messages in said:
            messages += opening(system if not messages else None, message)
        try:
            streams = _answers(writers, said, options)
        except UsageError as error:
            if not before:
                raise
            typer.echo(f"irq-convert: {error}; the conversation begins anew", err=True)
            said = [opening(system, message) for _ in writers]
            streams = _answers(writers, said, options)
        show(streams)
        report = report_of(message, streams)
        figures(report)
        for messages, stream in zip(said, streams, strict=True):
            messages.append({"role": "assistant", "content": stream.result().text})


def _answers(
    writers: Sequence[Writer], said: Sequence[list[Message]], options: GenerateOptions
) -> list[TextStream]:
    pairs = zip(writers, said, strict=True)
    return [begin(writer, "", messages, options) for writer, messages in pairs]


def _ask() -> str | None:
    """The next message that is not empty; None at the end of input, or where it is interrupted."""
    with suppress(ImportError):
        import readline  # noqa: F401 - lines can be edited and called again
    try:
        while not (line := input("> ")).strip():
            pass
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None
    return line
