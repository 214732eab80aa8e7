"""The whole job: from a prompt to what a model makes of it, alone or beside another."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from irq_convert.adapters.put_on import CheckedAdapter
from irq_convert.hf.limits import check_vocabulary
from irq_convert.jobs.common.options import chosen
from irq_convert.jobs.generate.models import Writer, load_writers
from irq_convert.jobs.generate.options import GenerateOptions, check_text
from irq_convert.jobs.generate.prompt import Message, encode_chat, encode_text
from irq_convert.jobs.generate.report import GenerateReport
from irq_convert.jobs.generate.stream import TextStream
from irq_convert.progress import Progress


def generate(
    model: str | Path,
    prompt: str,
    *,
    adapter: str | Path | CheckedAdapter | None = None,
    against: str | Path | None = None,
    chat: bool = False,
    system: str | None = None,
    tokenizer: str | Path | None = None,
    any_base: bool = False,
    on_text: Callable[[int, str], object] | None = None,
    options: GenerateOptions | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> GenerateReport:
    """What `model` (folder or Hub id), with its `adapter`, makes of `prompt`.

    `options`, or single `settings` of `GenerateOptions` (`temperature=0.8`). With `against` another
    model, without the adapter, writes on the same prompt, the two in turns. With `chat` the prompt
    is a message, in the model's chat template, after a message `system` where one is given.
    `on_text` is told each piece of text as it comes, with 0 for `model` and 1 for the other.

    Raises `UsageError` where options, prompt and models do not fit together (a tokenizer without
    chat template, a prompt that fills the model's positions); `IrqError` where a file or model
    cannot be read, a model gives NaN logits, or the device is out of memory.
    """
    options = chosen(GenerateOptions, options, settings)
    writers = load_writers(
        model,
        adapter=adapter,
        against=against,
        tokenizer=tokenizer,
        any_base=any_base,
        options=options,
        progress=progress,
    )
    messages = opening(system, prompt) if chat or system is not None else None
    streams = [begin(writer, prompt, messages, options) for writer in writers]
    with closing(in_turns(streams)) as pieces:
        for number, piece in pieces:
            if on_text is not None:
                on_text(number, piece)
    return report_of(prompt, streams)


def opening(system: str | None, prompt: str) -> list[Message]:
    """The messages of a conversation that begins with `prompt`."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def begin(
    writer: Writer, prompt: str, messages: Sequence[Message] | None, options: GenerateOptions
) -> TextStream:
    """The stream of a writer's answer to `messages`, or where there are none of what follows
    `prompt`. Raises as `check_text`, `encode_chat`, `encode_text` and `TextStream`.
    """
    for text in (prompt, *(message["content"] for message in messages or ())):
        check_text("prompt", text)
    if messages is None:
        ids = encode_text(writer.tokenizer, prompt, writer.name)
    else:
        ids = encode_chat(writer.tokenizer, messages, writer.name)
    check_vocabulary(writer.model, ids)
    return TextStream(writer, ids, options)


def in_turns(streams: Sequence[TextStream]) -> Generator[tuple[int, str], None, None]:
    """Pieces of all streams with the stream's number, one of each in turn until all have ended.

    Closed before that, or interrupted, it stops them.
    """
    left = list(enumerate(streams))
    try:
        while left:
            for pair in tuple(left):
                try:
                    yield pair[0], next(pair[1])
                except StopIteration:
                    left.remove(pair)
    finally:
        for stream in streams:
            with suppress(KeyboardInterrupt):
                stream.close()


def report_of(prompt: str, streams: Sequence[TextStream]) -> GenerateReport:
    """What came of one stream, or of two."""
    return GenerateReport(prompt, *(stream.result() for stream in streams))
