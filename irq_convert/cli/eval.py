"""The `eval` command: a model on a text file (perplexity and, against another model, divergence),
or on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.cli.console import quiet_libraries
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
from irq_convert.jobs.evaluate.options import EvalDtype, EvalOptions
from irq_convert.jobs.evaluate.task_options import TaskOptions

if TYPE_CHECKING:
    from irq_convert.adapters.put_on import CheckedAdapter
    from irq_convert.jobs.evaluate.report import EvalReport

_TEXT, _TASKS = "With --text", "With --tasks"


def eval_command(
    model: AnyModel,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file to predict.", show_default=False)
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="Tasks of lm-eval instead: mmlu,piqa,arc_easy."),
    ] = None,
    adapter: PutOn = None,
    any_base: AnyBase = False,
    against: Annotated[
        str | None, typer.Option(help="Reference model to compare with: folder or Hub id.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Window length in tokens.  \\[default: the model's, at most 2048]"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows or requests in one forward pass.")] = 1,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Stop after this many tokens of the text.", rich_help_panel=_TEXT),
    ] = None,
    from_fraction: Annotated[
        float,
        typer.Option(
            help="Skip this fraction of the text: 0.9 evaluates the last tenth.",
            rich_help_panel=_TEXT,
        ),
    ] = 0.0,
    fewshot: Annotated[
        int | None,
        typer.Option(
            help="Solved examples before each question.  \\[default: the task's]",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Only so many documents of each task.", rich_help_panel=_TASKS),
    ] = None,
    task_path: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with task files of your own.", rich_help_panel=_TASKS),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Ask in the model's chat template.", rich_help_panel=_TASKS),
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep/--no-keep",
            help="Keep the scores beside the artifact or adapter, for its card.",
            rich_help_panel=_TASKS,
        ),
    ] = True,
    dtype: Annotated[
        EvalDtype, typer.Option(help="Type to run the models in.")
    ] = EvalDtype.FLOAT32,
    device: Device = "cpu",
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    threads: TorchThreads = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on a text, and with --against KL to a reference; or --tasks.

    Every figure has its standard error. --adapter goes on the model, not on the reference.

    Example: irq-convert eval ./model-3bit --text wiki.txt --against ./model

    Example: irq-convert eval ./model-3bit --tasks piqa,arc_easy --fewshot 5 --against ./model
    """
    _check_kind(text, tasks, max_tokens, from_fraction, fewshot, limit, task_path, chat, keep)
    asked: EvalOptions | TaskOptions
    if text is not None:
        asked = EvalOptions(
            context=context,
            batch_size=batch_size,
            max_tokens=max_tokens,
            from_fraction=from_fraction,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    else:
        asked = TaskOptions(
            fewshot=fewshot,
            limit=limit,
            task_paths=tuple(task_path or ()),
            chat=chat,
            context=context,
            batch_size=batch_size,
            keep=keep,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    quiet_libraries(threads)
    checked = None if adapter is None else _check_adapter(adapter, model, any_base)
    if isinstance(asked, EvalOptions):
        assert text is not None
        _on_text(model, text, checked, against, tokenizer, asked, as_json)
    else:
        assert tasks is not None
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        _on_tasks(model, names, checked, against, tokenizer, asked, as_json)


def _check_kind(
    text: Path | None,
    tasks: str | None,
    max_tokens: int | None,
    from_fraction: float,
    fewshot: int | None,
    limit: int | None,
    task_path: list[Path] | None,
    chat: bool,
    keep: bool,
) -> None:
    """Refuse what says two things or nothing."""
    if (text is None) == (tasks is None):
        raise UsageError("eval: give either --text FILE or --tasks NAME,NAME")
    of_text = {"--max-tokens": max_tokens is not None, "--from-fraction": from_fraction != 0}
    of_tasks = {
        "--fewshot": fewshot is not None,
        "--limit": limit is not None,
        "--task-path": bool(task_path),
        "--chat": chat,
        "--no-keep": not keep,
    }
    others, kind = (of_tasks, "--tasks") if tasks is None else (of_text, "--text")
    wrong = next((name for name, given in others.items() if given), None)
    if wrong is not None:
        raise UsageError(f"{wrong}: belongs to {kind}, which is not given")


def _on_text(
    model: str,
    text: Path,
    adapter: CheckedAdapter | None,
    against: str | None,
    tokenizer: str | None,
    options: EvalOptions,
    as_json: bool,
) -> None:
    from irq_convert.cli.bar import ProgressBar
    from irq_convert.cli.eval_show import print_report
    from irq_convert.jobs.evaluate.evaluate import evaluate

    with ProgressBar("windows", speed=False) as bar:
        bar.stage("loading")
        result = evaluate(
            model,
            text,
            adapter=adapter,
            against=against,
            tokenizer=tokenizer,
            options=options,
            progress=bar,
        )
    if as_json:
        report = _report(model, text, adapter, against, tokenizer, options, result)
        typer.echo(json.dumps(report, indent=2))
    else:
        print_report(model, adapter, against, result)


def _on_tasks(
    model: str,
    names: list[str],
    adapter: CheckedAdapter | None,
    against: str | None,
    tokenizer: str | None,
    options: TaskOptions,
    as_json: bool,
) -> None:
    from irq_convert.cli.bar import ProgressBar
    from irq_convert.cli.eval_show import print_scores
    from irq_convert.jobs.evaluate.tasks import evaluate_tasks

    with ProgressBar("requests", speed=False) as bar:
        result = evaluate_tasks(
            model,
            names,
            adapter=adapter,
            against=against,
            tokenizer=tokenizer,
            options=options,
            progress=bar,
        )
    if as_json:
        asked = {
            "model": model,
            "adapter": None if adapter is None else adapter.to_dict(),
            "against": against,
            "tasks": names,
            "fewshot": options.fewshot,
            "limit": options.limit,
            "chat": options.chat,
            "dtype": str(options.dtype),
            "device": options.device,
        }
        typer.echo(json.dumps(asked | result.to_dict(), indent=2))
    else:
        print_scores(model, adapter, against, result)


def _check_adapter(adapter: Path, model: str, any_base: bool) -> CheckedAdapter:
    """The adapter, found to belong to the model; a doubt is said on stderr."""
    import warnings

    from irq_convert.adapters.put_on import check_adapter

    checked = check_adapter(adapter, model, any_base)
    if checked.doubt:
        typer.echo(f"irq-convert: {checked.doubt}", err=True)
    warnings.filterwarnings("ignore", message="this adapter was trained on")  # --any-base is meant
    return checked


def _report(
    model: str,
    text: Path,
    adapter: CheckedAdapter | None,
    against: str | None,
    tokenizer: str | None,
    options: EvalOptions,
    result: EvalReport,
) -> dict[str, object]:
    """What was asked and what was found, for JSON."""
    asked: dict[str, object] = {
        "model": model,
        "adapter": None if adapter is None else adapter.to_dict(),
        "against": against,
        "text": str(text),
        "tokenizer": tokenizer,
        "max_tokens": options.max_tokens,
        "from_fraction": options.from_fraction,
        "dtype": str(options.dtype),
        "device": options.device,
    }
    return {**asked, **result.to_dict()}
