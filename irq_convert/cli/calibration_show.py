"""A calibration, or a file of importance, in rows, as reports and `inspect` show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def calibration_rows(record: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The manifest's `calibration`; none where weights were quantized without data."""
    if not record:
        return []
    tokens = record["windows"] * record["window"]
    error = "" if record["kl_se"] is None else f" +- {record['kl_se']:.4f}"
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
