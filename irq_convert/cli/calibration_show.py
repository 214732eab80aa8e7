"""A calibration, a file of importance, or a target, in rows, as reports and `inspect` show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irq_convert.jobs.quantize.target import Point


def calibration_rows(record: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The manifest's `calibration`; none where weights were quantized without data."""
    if not record:
        return []
    tokens = record["windows"] * record["window"]
    error = "" if record["kl_se"] is None else f" ± {record['kl_se']:.4f}"
    kept = "" if record["kept"] == "calibrated" else ": no better, so kept without"
    return [
        ("calibrated", f"{record['text']}, {tokens:,} tokens in {record['windows']} windows"),
        ("held-out KL", f"{record['kl']:.4f}{error}, without data {record['plain']:.4f}{kept}"),
    ]


def importance_rows(record: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The manifest's `importance`: which file, and what was read for it; none without."""
    if not record:
        return []
    tokens, text = record.get("tokens"), record.get("text")
    seen = [f"{tokens:,} tokens" if isinstance(tokens, int) else "", f"of {text}" if text else ""]
    told = " ".join(filter(None, seen))
    name = f"{record.get('file')} ({record.get('kind')})"
    return [("importance", f"{name}: {told}" if told else name)]


def target_rows(record: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The manifest's `target`: what was asked for, and how the mix did; none without."""
    if not record:
        return []
    asked = f"{record['size']:,} bytes" if "size" in record else f"{record['bits']:g} bits a weight"
    error = "" if record["kl_se"] is None else f" ± {record['kl_se']:.4f}"
    rows = [("target", asked), ("KL of the mix", f"{record['kl']:.4f}{error}, held-out windows")]
    other = record["uniform"]
    if other:
        kept = "" if record["kept"] == "mix" else ", and kept"
        rows.append(("of uniform", f"{other['kl']:.4f} ({other['choice']} for all{kept})"))
    fitted = record.get("calibrated")
    if fitted:
        rows.append(
            ("both calibrated", f"mix {fitted['mix']:.4f}, uniform {fitted['uniform']:.4f}")
        )
    return rows


def frontier_lines(points: Sequence[Point]) -> list[str]:
    """A table of sizes against expected KL with a bar for each, what is asked for marked."""
    from irq_convert.checkpoint.system import short_bytes

    most = max(point.expected for point in points) or 1.0
    lines = ["      size    bits   expected KL"]
    for point in points:
        bar = "#" * max(1, round(40 * point.expected / most)) if point.expected else ""
        mark = ">" if point.nearest else " "
        size = short_bytes(point.size)
        lines.append(f"{mark} {size:>9}  {point.bits:6.3f}  {point.expected:8.4f}  {bar}")
    return lines
