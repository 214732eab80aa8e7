"""The `irq-convert` program: its commands, and how errors reach a person."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType
from typing import Annotated

import typer

from irq_convert.cli.demo import demo_command
from irq_convert.cli.eval import eval_command
from irq_convert.cli.export import export_command
from irq_convert.cli.finetune import finetune_command
from irq_convert.cli.generate import generate_command
from irq_convert.cli.inspect import inspect_command
from irq_convert.cli.measure import measure_command
from irq_convert.cli.merge import merge_command
from irq_convert.cli.push import push_command
from irq_convert.cli.quantize import quantize_command
from irq_convert.cli.verify import verify_command
from irq_convert.core.codebook import WIDTHS_IN_WORDS
from irq_convert.errors import IrqError
from irq_convert.version import PRODUCER

app = typer.Typer(
    name="irq-convert",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=f"Quantize language models to {WIDTHS_IN_WORDS} bits; check, measure and load the result.",
)
app.command("quantize")(quantize_command)
app.command("measure")(measure_command)
app.command("inspect")(inspect_command)
app.command("verify")(verify_command)
app.command("eval")(eval_command)
app.command("generate")(generate_command)
app.command("finetune")(finetune_command)
app.command("merge")(merge_command)
app.command("export")(export_command)
app.command("push")(push_command)
app.command("demo")(demo_command)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(PRODUCER)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave as after Ctrl-C, so that what is half written is removed."""
    sys.exit(128 + number)


def _lost_output() -> None:
    """End with one line where it is standard output that cannot be written."""
    try:
        print(flush=True)  # nothing else tells whose error it was
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter tries once more
        reason = (error.strerror or type(error).__name__).lower()
        print(f"irq-convert: standard output: {reason}", file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """Run a command; an `IrqError` becomes one line on stderr and its exit code.

    typer sees to usage errors, Ctrl-C (130) and a reader of the output that went away (1).
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what matters is told by errors of ours
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if isinstance(sys.stdout, TextIOWrapper):  # a path may have bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP: leave it so
            signal.signal(number, _stop)
    try:
        app()
    except IrqError as error:
        print(f"irq-convert: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            _lost_output()
            raise
        reason = (error.strerror or type(error).__name__).lower()
        print(f"irq-convert: {error.filename}: {reason}; check the path", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing it takes seconds
            raise
        what = str(error).partition(".")[0]
        print(f"irq-convert: {what}: stop what else uses it, or use --device cpu", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("irq-convert: interrupted", file=sys.stderr)
        sys.exit(130)
