"""The `eval` command: perplexity of a model on a text file and, against another model, KL
divergence and top-1 agreement."""

import json
from collections.abc import Iterator
from math import floor, isfinite, log, log10
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.cli.console import quiet_libraries
from irq_convert.cli.shared import TrustRemoteCode
from irq_convert.jobs.evaluate.options import EvalDtype, EvalOptions

if TYPE_CHECKING:
    from irq_convert.adapters.put_on import CheckedAdapter
    from irq_convert.jobs.evaluate.report import EvalReport


def eval_command(
    model: Annotated[str, typer.Argument(help="Model folder or Hub id, dense or quantized.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text file to predict.", show_default=False)],
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Adapter to put on MODEL: plain, IEC or block-pooled."),
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Take an adapter that was trained on another model.")
    ] = False,
    against: Annotated[
        str | None, typer.Option(help="Reference model to compare with: folder or Hub id.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Window length in tokens.  \\[default: the model's, at most 2048]"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 1,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop after this many tokens of the text.")
    ] = None,
    from_fraction: Annotated[
        float,
        typer.Option(help="Skip this fraction of the text: 0.9 evaluates the last tenth."),
    ] = 0.0,
    dtype: Annotated[
        EvalDtype, typer.Option(help="Type to run the models in.")
    ] = EvalDtype.FLOAT32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")] = "cpu",
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the tokenizer, if not the model's.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.  \\[default: torch's]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure perplexity on a text file and, with --against, KL divergence and agreement.

    Every figure comes with its standard error, counted by window. With --adapter the model carries
    the adapter, the reference does not.

    Example: irq-convert eval ./model-3bit --text wiki.txt --against ./model
    """
    options = EvalOptions(
        context=context,
        batch_size=batch_size,
        max_tokens=max_tokens,
        from_fraction=from_fraction,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )

    from irq_convert.cli.bar import ProgressBar
    from irq_convert.jobs.evaluate.evaluate import evaluate

    quiet_libraries(threads)
    checked = None if adapter is None else _check_adapter(adapter, model, any_base)
    with ProgressBar("windows", speed=False) as bar:
        bar.stage("loading")
        result = evaluate(
            model,
            text,
            adapter=checked,
            against=against,
            tokenizer=tokenizer,
            options=options,
            progress=bar,
        )
    if as_json:
        report = _report(model, text, checked, against, tokenizer, options, result)
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_table(model, checked, against, result)


def _check_adapter(adapter: Path, model: str, any_base: bool) -> "CheckedAdapter":
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
    adapter: "CheckedAdapter | None",
    against: str | None,
    tokenizer: str | None,
    options: EvalOptions,
    result: "EvalReport",
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


def _print_table(
    model: str, adapter: "CheckedAdapter | None", against: str | None, result: "EvalReport"
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("std. error", justify="right")
    for name, value, se in _rows(result):
        table.add_row(name, value, se)
    console = Console()
    console.print(f"model      {escape(model)}", soft_wrap=True, highlight=False)
    if adapter is not None:
        console.print(
            f"adapter    {escape(adapter.folder)} ({adapter.kind})", soft_wrap=True, highlight=False
        )
    if against is not None:
        console.print(f"reference  {escape(against)}", soft_wrap=True, highlight=False)
    console.print(
        f"scored     {result.tokens:,} tokens in {result.windows:,} "
        f"window{'s' if result.windows > 1 else ''} of {result.context:,}",
        highlight=False,
    )
    console.print(table)
    if result.windows == 1:
        console.print("One window only: no standard error. Give more text or a smaller context.")


def _rows(result: "EvalReport") -> Iterator[tuple[str, str, str]]:
    """Rows of the table: what, value, standard error."""
    bits_se = None if result.nll_se is None else result.nll_se / log(2)
    yield "perplexity", *_figures(result.perplexity, result.perplexity_se)
    yield "NLL, nats a token", *_figures(result.nll, result.nll_se)
    yield "bits a token", *_figures(result.bits_per_token, bits_se)
    if result.compared:
        yield (
            "reference perplexity",
            *_figures(result.reference_perplexity, result.reference_perplexity_se),
        )
        yield "NLL minus reference's", *_figures(result.nll_difference, result.nll_difference_se)
        yield "KL(reference || model), nats", *_figures(result.kl, result.kl_se)
        yield "same top token, %", *_figures(result.top1, result.top1_se, scale=100)


def _figures(value: float | None, se: float | None, scale: float = 1.0) -> tuple[str, str]:
    """Value and standard error, both to the second digit of the error (at least 2 decimals)."""
    assert value is not None
    value *= scale
    if se is None:
        return f"{value:.6g}", ""
    se *= scale
    if not isfinite(se) or se == 0:
        return f"{value:.6g}", f"{se:g}"
    digits = min(12, max(2, 1 - floor(log10(se))))
    return f"{value:.{digits}f}", f"{se:.{digits}f}"
