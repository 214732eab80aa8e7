"""How the `eval` command shows what it found: perplexity and its like, or scores on tasks."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor, isfinite, log, log10
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from irq_convert.adapters.put_on import CheckedAdapter
    from irq_convert.jobs.evaluate.report import EvalReport
    from irq_convert.jobs.evaluate.task_report import TaskReport, TaskScore


def print_report(
    model: str, adapter: CheckedAdapter | None, against: str | None, result: EvalReport
) -> None:
    """Perplexity and, of a comparison, divergence and agreement."""
    table = Table()
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("std. error", justify="right")
    for name, value, se in _rows(result):
        table.add_row(name, value, se)
    console = Console()
    _print_models(console, model, adapter, against)
    console.print(
        f"scored     {result.tokens:,} tokens in {result.windows:,} "
        f"window{'s' if result.windows > 1 else ''} of {result.context:,}",
        highlight=False,
    )
    console.print(table)
    if result.windows == 1:
        console.print("One window only: no standard error. Give more text or a smaller context.")


def _rows(result: EvalReport) -> Iterator[tuple[str, str, str]]:
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


def print_scores(
    model: str, adapter: CheckedAdapter | None, against: str | None, report: TaskReport
) -> None:
    """A line for each metric of each task and group; the tasks of a group are in the JSON."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("shots", justify="right")
    table.add_column("metric")
    headings = ["score", "reference", "difference"] if report.compared else ["score"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    last = ""
    for score in report.shown:
        name = escape(score.task) if score.task != last else ""
        shots = "" if score.fewshot is None or not name else str(score.fewshot)
        last = score.task
        table.add_row(name, shots, escape(_metric(score)), *_score_cells(score, report.compared))
    console = Console()
    _print_models(console, model, adapter, against)
    console.print(f"harness    lm-eval {report.lm_eval}", highlight=False)
    console.print(table)
    if report.kept is not None:
        console.print(f"kept in    {escape(report.kept)}", soft_wrap=True, highlight=False)


def _print_models(
    console: Console, model: str, adapter: CheckedAdapter | None, against: str | None
) -> None:
    on_it = None if adapter is None else f"{adapter.folder} ({adapter.kind})"
    for label, value in (("model", model), ("adapter", on_it), ("reference", against)):
        if value is not None:
            console.print(f"{label:<10} {escape(value)}", soft_wrap=True, highlight=False)


def _metric(score: TaskScore) -> str:
    """Its name, and its filter where there may be several."""
    return score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"


def _score_cells(score: TaskScore, compared: bool) -> Iterator[str]:
    digits = 3 if compared else 4  # three of them have to fit
    yield _with_error(score.value, score.se, f".{digits}f")
    if compared:
        known = score.reference is not None
        yield _with_error(score.reference, score.reference_se, ".3f") if known else ""
        yield _with_error(score.difference, score.difference_se, "+.3f") if known else ""


def _with_error(value: float | None, se: float | None, form: str) -> str:
    """`0.412 ± 0.014`."""
    assert value is not None
    return f"{value:{form}}" + ("" if se is None else f" ± {se:{form.removeprefix('+')}}")
