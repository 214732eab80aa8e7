"""What `merge` prints: the estimate, the report, the layers that were quantized again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irq_convert.jobs.merge.estimate import MergeEstimate
    from irq_convert.jobs.merge.report import LogitsCheck, MergedLayer, MergeReport


def print_estimate(found: MergeEstimate) -> None:
    from irq_convert.checkpoint.system import short_bytes
    from irq_convert.cli.console import facts, resume_rows

    free = "free" if found.disk_needed <= found.disk_free else "free: not enough"
    facts(
        [
            ("artifact", f"{found.base} ({found.base_sha256[:12]})"),
            ("adapter", f"{found.adapter} ({found.kind}, {short_bytes(found.adapter_bytes)})"),
            ("would write", f"{found.out} ({found.to}), {found.bytes_out:,} bytes + records"),
            ("files", f"{found.shards} of weights"),
            ("merged", f"{found.layers} layers by {found.how}, {found.saved} saved tensors"),
            ("memory", f"about {short_bytes(found.memory)} to merge"),
            ("check", found.check),
            *resume_rows(found.finished, found.shards),
            ("disk needed", f"{found.disk_needed:,} bytes ({short_bytes(found.disk_free)} {free})"),
        ]
    )


def print_report(report: MergeReport) -> None:
    from irq_convert.checkpoint.system import short_bytes
    from irq_convert.cli.console import facts, seconds

    ways: dict[str, int] = {}
    for layer in report.layers:
        ways[layer.how] = ways.get(layer.how, 0) + 1
    merged = ", ".join(f"{count} {_WAYS[how]}" for how, count in ways.items()) or "none"
    rows = [
        ("result", f"{report.out} ({report.to})"),
        ("size", f"{short_bytes(report.bytes_in)} -> {short_bytes(report.bytes_out)}"),
        ("artifact", report.base_sha256[:12]),
        ("adapter", f"{report.adapter_sha256[:12]} ({report.kind})"),
        ("layers", merged),
    ]
    if report.saved:
        rows.append(("saved tensors", f"{len(report.saved)} in place of the artifact's"))
    if report.untied:
        rows.append(("untied", f"{', '.join(report.untied)}: no longer the embedding"))
    if report.dtypes:
        parts = [f"{count} in {dtype}" for dtype, count in report.dtypes.items()]
        rows.append(("dense tensors", ", ".join(parts)))
    if report.bits_per_weight is not None:
        rows.append(("bits per weight", f"{report.bits_per_weight:.4f}"))
    if report.survived is not None:
        rows.append(("survived", f"{report.survived:.4f} of what was learned (1 is all)"))
    rows += _check_rows(report)
    facts([*rows, ("time", seconds(report.seconds))])
    for name, costs in (("tau", report.tau), ("scale", report.scale)):
        if costs is not None:
            _print_costs(name, costs, report.tau_dtype)


_WAYS = {
    "dense": "dense",
    "tau": "by moving tau: codes and scales untouched",
    "statistics": "by moving what was trained of scale and tau: codes untouched",
    "requantized": "quantized again",
    "unchanged": "unchanged",
    "folded": "folded",
}


def _check_rows(report: MergeReport) -> list[tuple[str, str]]:
    if not report.layers_checked:
        return [("checked", "no (--check none)")]
    rows = [("layers checked", f"largest difference {_number(report.largest_difference)}")]
    rows.append(("logits checked", _logits(report.logits)))
    return rows


def _logits(found: LogitsCheck) -> str:
    if found.difference is None:
        return f"no: {found.reason}"
    allowed = "" if found.tolerance is None else f" (allowed {found.tolerance:.1e})"
    return f"difference {found.difference:.1e}{allowed}; adapter's effect {found.effect:.1e}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _print_costs(what: str, costs: Mapping[str, Any], chosen: str | None) -> None:
    """What storing the moved statistic costs in each dtype."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        f"{what} stored as", "largest change", "rms", box=None, pad_edge=False, title=None
    )
    for name, found in costs["stored"].items():
        mark = " (this result)" if name == chosen else ""
        largest = "does not fit" if found["max"] is None else _number(found["max"])
        table.add_row(f"{name}{mark}", largest, _number(found["rms"]))
    moved = costs["moved"]
    table.add_row("how far it moved", _number(moved["max"]), _number(moved["rms"]))
    console = Console(width=80)
    console.print(f"\nCost of storing {what}, as parts of each block's scale")
    console.print(table)


def print_layers(report: MergeReport) -> None:
    """Every layer that was quantized again, those that kept least first."""
    from rich.console import Console
    from rich.table import Table

    again = [layer for layer in report.layers if layer.how == "requantized"]
    if not again:
        return
    table = Table("layer", box=None, pad_edge=False)
    for name in ("change", "survived"):
        table.add_column(name, justify="right")
    for layer in sorted(again, key=_survived):
        table.add_row(layer.tensor, _number(layer.change), f"{_survived(layer):.4f}")
    console = Console(width=80)
    console.print("\nLayers quantized again (change: of the adapter, of the weights' size)")
    console.print(table)


def _survived(layer: MergedLayer) -> float:
    return 0.0 if layer.survived is None else layer.survived
