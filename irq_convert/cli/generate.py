"""The `generate` command: what a model makes of a prompt, as it comes."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.cli.console import StageLines, quiet_libraries
from irq_convert.cli.shared import (
    AnyBase,
    AnyModel,
    AsJson,
    Device,
    PutOn,
    Tokenizer,
    TorchThreads,
    TrustRemoteCode,
)
from irq_convert.errors import UsageError
from irq_convert.jobs.generate.options import GenerateDtype, GenerateOptions, check_text

if TYPE_CHECKING:
    from irq_convert.jobs.generate.models import Writer

INTERRUPTED = 130


def generate_command(
    model: AnyModel,
    prompt: Annotated[
        str | None, typer.Option(help="Text to go on with; - reads it from standard input.")
    ] = None,
    adapter: PutOn = None,
    any_base: AnyBase = False,
    against: Annotated[
        str | None, typer.Option(help="Another model beside it, as the source: two columns.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Speak to it by its chat template; without --prompt in turns."),
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="With --chat: what stands before the first message.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sample at this temperature.  \\[default: 0, the likeliest token]"),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest of this probability together.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling: the same seed, the same text.")] = 0,
    dtype: Annotated[
        GenerateDtype, typer.Option(help="Type to run in; auto is the model's own.")
    ] = GenerateDtype.AUTO,
    device: Device = "cpu",
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    threads: TorchThreads = None,
    as_json: AsJson = False,
) -> None:
    """Let a model write, and see its text as it comes; then how fast it was.

    Greedy unless --temperature or --top-p is given. Ctrl-C ends it with what there is.

    Example: irq-convert generate ./model-3bit --prompt "Once upon a time" --against ./model
    """
    options = GenerateOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    talk = chat and prompt is None
    _check(prompt, chat, system, talk, as_json)
    given = _given(prompt, system)
    quiet_libraries(threads)
    from irq_convert.jobs.generate.models import load_writers

    writers = load_writers(
        model,
        adapter=adapter,
        against=against,
        tokenizer=tokenizer,
        any_base=any_base,
        options=options,
        progress=StageLines(),
    )
    if talk:
        from irq_convert.cli.chat import talk_with

        talk_with(writers, system, options)
    else:
        assert given is not None
        _once(writers, given, system, chat, options, as_json)


def _check(prompt: str | None, chat: bool, system: str | None, talk: bool, as_json: bool) -> None:
    if system is not None and not chat:
        raise UsageError("--system: is a message of a conversation, which --chat makes of it")
    if prompt is None and not chat:
        raise UsageError("--prompt: give a text to go on with, - for standard input, or --chat")
    if talk and (as_json or not sys.stdin.isatty()):
        raise UsageError(
            "--chat without --prompt talks with who sits at the terminal"
            f"{', and --json does not' if as_json else ', and there is none'}: give --prompt"
        )


def _given(prompt: str | None, system: str | None) -> str | None:
    """The prompt, from standard input where it says so; texts that are none are refused here."""
    if prompt == "-":
        # Read as bytes: what a locale makes of them is not the text's encoding.
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").replace("\r\n", "\n")
        check_text("standard input", prompt)
    for option, text in (("--prompt", prompt), ("--system", system)):
        check_text(option, text or "")
    return prompt


def _once(
    writers: list[Writer],
    prompt: str,
    system: str | None,
    chat: bool,
    options: GenerateOptions,
    as_json: bool,
) -> None:
    """One prompt; what there is is shown even where a person stops it."""
    from irq_convert.cli.generate_show import figures, show
    from irq_convert.jobs.generate.generate import begin, opening, report_of

    messages = opening(system, prompt) if chat else None
    streams = [begin(writer, prompt, messages, options) for writer in writers]
    whole = show(streams, prompt="" if chat else prompt, silent=as_json)
    report = report_of(prompt, streams)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        figures(report)
    if not whole:
        raise typer.Exit(INTERRUPTED)
