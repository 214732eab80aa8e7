"""The part of a model card that says how it does on tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from irq_convert.jobs.push.card_table import table


def scores_part(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scores of `irq_scores.json` as a table with standard errors; empty where there are none.

    Tasks of a group that has a score of its own are left to the file.
    """
    if not scores:
        return []
    compared = [row for row in scores if row.get("reference") is not None]
    head = ["task", "examples", "metric", "score"]
    head += ["reference", "difference"] if compared else []
    shown = [row for row in scores if not row.get("in_group")]
    rows = [_cells(row, bool(compared)) for row in shown]
    harness = sorted({str(row.get("lm_eval")) for row in scores})
    text = f"By lm-evaluation-harness {' and '.join(harness)}, with standard errors"
    names = sorted({f"`{row['against']}`" for row in compared if row.get("against")})
    text += f"; the reference is {' or '.join(names)}." if names else "."
    return ["## Scores", text, table(head, rows)]


def _cells(row: Mapping[str, Any], compared: bool) -> list[str]:
    kind = row.get("filter")
    first = f", first {row['limit']} documents" if row.get("limit") else ""
    chat = ", as a chat" if row.get("chat") else ""
    cells = [
        f"{row['task']}{first}{chat}",
        str(row["fewshot"]) if row.get("fewshot") is not None else "",
        f"{row['metric']}" if kind in (None, "none") else f"{row['metric']} ({kind})",
        _figure(row, "value", "se"),
    ]
    if compared:
        cells += [_figure(row, "reference", "reference_se")]
        cells += [_figure(row, "difference", "difference_se", "+")]
    return cells


def _figure(row: Mapping[str, Any], name: str, error: str, sign: str = "") -> str:
    value, se = row.get(name), row.get(error)
    if value is None:
        return ""
    return f"{value:{sign}.4f}" + ("" if se is None else f" \u00b1 {se:.4f}")
